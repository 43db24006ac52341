"""Several real processes as one run, on CPU with gloo: the command that a pod runs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lsjax
from tests.conftest import process_environment
from tests.helpers.processes import DEVICES, TRAIN, assert_same_run, finish, start

ROOT = Path(__file__).parent.parent.parent
CONFIG = """
from lsjax.config import default_config

def get_config():
    config = default_config()
    config.model.update(num_layers=4, width=32, num_heads=4, num_kv_heads=2, head_width=8, feed_forward_width=48)
    config.model.update(vocab_size=320, context_length=128)
    config.layerskip.exit_rotation = 3
    config.data.update(corpus="{corpus}", held_out_fraction=0.2)
    config.training.update(total_steps=20, batch_size=8, sequence_length=32, warmup_steps=2, log_every_steps=1)
    config.training.update(loss_chunk=64, compute_dtype="float32")
    config.mesh.update(data=2, fsdp=2, tensor=2)
    config.checkpoint.every_steps = 5
    config.evaluation.update(every_steps=10, max_batches=2)
    return config
"""


@pytest.fixture(scope="module")
def config(text_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG.format(corpus=text_folder))
    return path


def records(workdir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: line[key] for key in ("step", "loss", "final_loss", "exit_losses", "gradient_norm")} for line in lines
    ]


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The records of the whole run in one process."""
    workdir = tmp_path_factory.mktemp("alone")
    ((status, _, err),) = finish(start(config, workdir, 1))
    assert status == 0, err
    return records(workdir)


def wait_for_checkpoint(workdir: Path, step: int, processes, timeout=180) -> None:
    deadline = time.monotonic() + timeout
    while not (workdir / "checkpoints" / str(step)).is_dir():
        assert time.monotonic() < deadline, [p.communicate()[1] for p in processes if p.poll() is not None]
        assert all(p.poll() is None for p in processes), [p.communicate()[1] for p in processes if p.poll() is not None]
        time.sleep(0.05)


@pytest.mark.slow
def test_four_processes_are_one_run(config, alone, tmp_path):
    results = finish(start(config, tmp_path, 4))
    assert [status for status, *_ in results] == [0] * 4, results[0][2]
    assert_same_run(records(tmp_path), alone)
    assert f"on {DEVICES} cpu device(s) on 4 hosts" in results[0][1]
    assert not any("step" in out or "corpus" in out for _, out, _ in results[1:]), results[1][
        1
    ]  # only the leader prints
    assert lsjax.load(tmp_path).step == 20


def test_two_processes_are_one_run_and_slurm_says_who_is_who(config, alone, tmp_path):
    """Runs --distributed with the variables that srun sets, in which JAX finds coordinator, count and rank."""
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    ranks = [slurm | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    command = [sys.executable, TRAIN, f"--config={config}", f"--workdir={tmp_path}"]
    here = process_environment(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES=str(DEVICES // 2))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    results = finish([subprocess.Popen([*command, "--distributed"], env=here | rank, **pipes) for rank in ranks])
    assert [status for status, *_ in results] == [0, 0], results[0][2]
    assert_same_run(records(tmp_path), alone)


@pytest.mark.slow
def test_two_processes_adapt_one_base(config, tmp_path):
    """Reads the base from a checkpoint, for which every host waits for the others, also where it is hashed."""
    short = ["--config.training.total_steps=4", "--config.training.learning_rate=0.01"]
    ((status, _, err),) = finish(start(config, tmp_path / "base", 1, *short))
    assert status == 0, err
    lora = [*short, "--config.training.lora_rank=2", f"--config.initial_model={tmp_path / 'base'}"]
    runs = {name: finish(start(config, tmp_path / name, count, *lora)) for name, count in (("one", 1), ("two", 2))}
    assert [status for results in runs.values() for status, *_ in results] == [0] * 3, runs
    assert_same_run(records(tmp_path / "two"), records(tmp_path / "one"))
    bases = [json.loads((tmp_path / name / "base_model.json").read_text()) for name in runs]
    assert bases[0] == bases[1]
    assert lsjax.load(tmp_path / "two").step == 4


def test_without_any_cluster_the_flags_are_named(config, tmp_path):
    command = [sys.executable, TRAIN, f"--config={config}", f"--workdir={tmp_path}"]
    done = subprocess.run([*command, "--distributed"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "--coordinator, --num_processes and --process_id" in done.stderr


LONG = "--config.training.total_steps=2000"


# Long enough to be killed between steps.
LONGER = ("--config.training.total_steps=50", "--config.checkpoint.every_steps=15")


@pytest.mark.slow
def test_a_killed_rank_stops_the_others_and_fewer_hosts_go_on(config, tmp_path):
    """Kills one rank: the others say so and end. One process with all devices then resumes from the checkpoint."""
    ((status, _, err),) = finish(start(config, tmp_path / "alone", 1, *LONGER))
    assert status == 0, err
    processes = start(config, tmp_path / "killed", 2, *LONGER)
    wait_for_checkpoint(tmp_path / "killed", 15, processes)
    processes[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    (status, _, err), _ = finish(processes, timeout=120)
    assert status != 0
    assert time.monotonic() - began < 100
    # Between steps the message is ours. During a save, when hosts wait for each other, JAX says it and aborts.
    assert "another host is gone" in err or "This most likely indicates that another task died" in err
    ((status, out, err),) = finish(start(config, tmp_path / "killed", 1, *LONGER))
    assert status == 0, err
    assert "resuming at step" in out
    assert_same_run(records(tmp_path / "killed"), records(tmp_path / "alone"), 1e-3)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_the_same_step(config, tmp_path):
    processes = start(config, tmp_path, 2, LONG)
    wait_for_checkpoint(tmp_path, 5, processes)
    processes[1].send_signal(signal.SIGTERM)
    results = finish(processes)
    assert [status for status, *_ in results] == [143, 143], results
    assert "interrupted: saved at step" in results[0][1]
    saved = lsjax.load(tmp_path).step
    assert f"saved at step {saved};" in results[0][1]
    assert records(tmp_path)[-1]["step"] == saved < 2000


def test_hosts_that_disagree_are_named(config, tmp_path):
    results = finish(start(config, tmp_path, 2, own_flags={1: ["--config.training.learning_rate=0.5"]}))
    for status, _, err in results:
        assert status == 2
        assert "hosts disagree: config.training.learning_rate is 0.001 on host 0, 0.5 on 1" in err
    assert not (tmp_path / "config.json").exists()


ON_ITS_PROCESSOR = """
import pathlib, runpy, sys
from lsjax.model import execution
flags = "amx_bf16" if "--process_id=0" in sys.argv else "avx2"
execution.CPU_INFO = pathlib.Path(__file__).with_name(flags)
execution.CPU_INFO.write_text(flags)
sys.path.insert(0, "{folder}")
runpy.run_path("{train}", run_name="__main__")
"""


@pytest.mark.slow
def test_hosts_whose_processors_differ_are_named(config, tmp_path):
    """Refuses the run: one host would multiply bfloat16, the other float32, two programs that would never meet."""
    script = tmp_path / "train.py"
    script.write_text(ON_ITS_PROCESSOR.format(folder=TRAIN.parent, train=TRAIN))
    run = tmp_path / "run"
    for status, _, err in finish(start(config, run, 2, "--config.training.compute_dtype=auto", script=script)):
        assert status == 2
        assert "hosts disagree: config.training.compute_dtype.auto is 'float32 with products of bfloat16" in err
    assert not (run / "config.json").exists()


@pytest.mark.slow
def test_hosts_read_their_shares_of_a_mixture(config, text_folder, tmp_path):
    for number, path in enumerate(sorted(text_folder.iterdir())):
        half = tmp_path / ("first", "second")[number % 2]
        half.mkdir(exist_ok=True)
        (half / path.name).write_bytes(path.read_bytes())
    flags = [
        f"--config.data.mixture=first={tmp_path}/first:0.7,second={tmp_path}/second:0.3",
        "--config.data.held_out_fraction=0.4",
    ]
    for workdir, processes in ((tmp_path / "alone", 1), (tmp_path / "two", 2)):
        results = finish(start(config, workdir, processes, *flags))
        assert [status for status, *_ in results] == [0] * processes, results[0][2]
    assert_same_run(records(tmp_path / "two"), records(tmp_path / "alone"))
    last = [(tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1] for name in ("alone", "two")]
    assert [json.loads(line)["mixture"] for line in last] == [{"first": 0.7, "second": 0.3}] * 2
