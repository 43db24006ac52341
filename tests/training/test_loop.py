"""Whole runs: what they leave on disk, exact resumption, and every way to stop one."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import lsjax
from lsjax.config import MeshConfig
from lsjax.data.pipeline import held_out_batches
from lsjax.errors import UserError
from lsjax.evaluation.exits import exit_profile
from lsjax.training.loop import train
from lsjax.training.metrics import RunLog, read_complete_lines
from tests.conftest import process_environment
from tests.helpers.runs import replace

pytestmark = pytest.mark.usefixtures("compilation_cache")

TIMING = {"tokens_per_second", "tokens_per_second_per_device"}


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(workdir):
    lines = read_complete_lines(workdir / "metrics.jsonl")
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in lines]


@pytest.fixture(scope="module")
def finished(text_folder, tmp_path_factory):
    """An uninterrupted run on one device, and its config."""
    config = _tiny_run(text_folder)
    workdir = tmp_path_factory.mktemp("finished")
    return config, workdir, train(config, workdir, verbose=False)


def _tiny_run(text_folder):
    from tests import conftest

    return conftest.tiny_run.__wrapped__(text_folder)


def test_a_run_leaves_what_it_promises(finished):
    _, workdir, result = finished
    rows = read_lines(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert set(rows[0]) == {
        "step", "loss", "final_loss", "exit_losses", "gradient_norm", "learning_rate", "layer_dropout_rate", *TIMING,
    }  # fmt: skip
    # Step number t = 0 is the first: rotation 3 turns on exits 0 and 3, then 1 and 3 (the last), then 2 and 3.
    assert [sorted(row["exit_losses"]) for row in rows[:3]] == [["1", "4"], ["2", "4"], ["3", "4"]]
    assert rows[0]["exit_losses"]["4"] == rows[0]["final_loss"] == pytest.approx(np.log(320), rel=0.02)
    assert rows[-1]["final_loss"] < rows[0]["final_loss"]
    evaluations = read_lines(workdir / "evaluations.jsonl")
    assert [row["step"] for row in evaluations] == [6, 12]
    assert evaluations[-1]["loss"]["4"] == pytest.approx(result.profile.loss[3])
    assert {"config.json", "tokenizer.json", "checkpoints", "tensorboard"} <= {p.name for p in workdir.iterdir()}
    assert any(p.name.startswith("events.") for p in (workdir / "tensorboard").iterdir())


def test_the_workdir_alone_is_loadable(finished, tmp_path):
    config, workdir, result = finished
    model = lsjax.load(workdir)
    assert model.step == 12
    assert model.config == config.model
    jax.tree.map(np.testing.assert_array_equal, model.params, jax.device_get(result.params))
    batches = held_out_batches(workdir / "data", 8, 32, 2)
    np.testing.assert_allclose(exit_profile(model.params, batches, config.model).loss, result.profile.loss, rtol=1e-5)
    text = model.tokenizer.decode(model.tokenizer.encode("def f():"))
    assert text == "def f():"


def test_only_the_last_checkpoints_are_kept(finished):
    _, workdir, _ = finished
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [10, 12]


def test_running_again_changes_nothing(finished):
    config, workdir, result = finished
    before = metrics(workdir)
    again = train(config, workdir, verbose=False)
    assert again.step == 12
    assert metrics(workdir) == before
    assert [row["step"] for row in read_lines(workdir / "evaluations.jsonl")] == [6, 12]
    np.testing.assert_allclose(again.profile.loss, result.profile.loss, rtol=1e-6)


@pytest.fixture(scope="module")
def uninterrupted(text_folder, tmp_path_factory):
    """A longer run, so that a signal surely arrives before its end."""
    # Saving and evaluating fall on the same steps, so that stopping between the two is tried as well.
    config = replace(_tiny_run(text_folder), training={"total_steps": 40}, evaluation={"every_steps": 5})
    workdir = tmp_path_factory.mktemp("uninterrupted")
    train(config, workdir, verbose=False)
    return config, workdir


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_stopped_anywhere_resumes_bit_for_bit(uninterrupted, tmp_path, signal_number):
    """A real process, stopped in the middle of its steps, then run again to the end."""
    config, reference = uninterrupted
    workdir = tmp_path / "run"
    code = (
        "import json, sys, jax; jax.config.update('jax_num_cpu_devices', 8);"
        "from lsjax.config import Config; from lsjax.training.loop import train;"
        "train(Config.from_dict(json.loads(sys.argv[1])), sys.argv[2])"
    )
    command = [sys.executable, "-c", code, json.dumps(config.to_dict()), str(workdir)]
    here = process_environment()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=here)
    _wait_for_steps(workdir, 17, process)
    process.send_signal(signal_number)
    errors = process.communicate(timeout=60)[1].decode()
    last_step = metrics(workdir)[-1]["step"]
    assert last_step < 40
    if signal_number == signal.SIGTERM:  # asked kindly, it saves where it is
        assert process.returncode == 0, errors  # the status is for the command to choose
        assert max(int(p.name) for p in (workdir / "checkpoints").iterdir()) == last_step
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=120, env=here)
    assert metrics(workdir) == metrics(reference)
    assert read_lines(workdir / "evaluations.jsonl") == read_lines(reference / "evaluations.jsonl")
    ours, theirs = lsjax.load(workdir), lsjax.load(reference)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)


def _wait_for_steps(workdir, steps, process):
    path = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_text().count("\n") >= steps:
            return
        time.sleep(0.005)
    raise AssertionError(f"no {steps} steps: {process.communicate()[1].decode()[-2000:]}")


def test_half_a_line_of_metrics_is_dropped(finished, tmp_path):
    """A process killed while writing: the torn line goes, the rest stays."""
    _, workdir, _ = finished
    whole = (workdir / "metrics.jsonl").read_text()
    torn = tmp_path / "metrics.jsonl"
    torn.write_text(whole[:-9])
    assert read_complete_lines(torn) == whole.splitlines()[:-1]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tiny_run, tmp_path):
    config = replace(tiny_run, checkpoint={"every_steps": 2})
    train(replace(config, training={"total_steps": 4}), tmp_path, verbose=False)
    healthy = lsjax.load(tmp_path)
    explosive = replace(config, training={"learning_rate": 1e30, "gradient_clip": 1e30})
    (tmp_path / "config.json").write_text(json.dumps(explosive.to_dict()))
    with pytest.raises(UserError, match=r"step \d+: .*(exit layer \d|gradient norm)"):
        train(explosive, tmp_path, verbose=False)
    kept = lsjax.load(tmp_path)
    assert kept.step == healthy.step == 4
    jax.tree.map(np.testing.assert_array_equal, kept.params, healthy.params)


@pytest.mark.slow
def test_a_run_continues_on_another_mesh(tiny_run, tmp_path):
    one = replace(tiny_run, mesh=dataclasses.asdict(MeshConfig(8, 1, 1)))
    straight = train(one, tmp_path / "a", verbose=False)
    # Stopped by hand after step 10: the later checkpoint is removed.
    train(one, tmp_path / "b", verbose=False)
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "12")
    moved = train(replace(one, mesh=dataclasses.asdict(MeshConfig(1, 4, 2))), tmp_path / "b", verbose=False)
    np.testing.assert_allclose(moved.profile.loss, straight.profile.loss, rtol=1e-5)


def test_a_workdir_of_another_config_is_refused(finished):
    config, workdir, _ = finished
    other = replace(config, training={"learning_rate": 0.5})
    with pytest.raises(UserError, match=r"holds another run: config.training.learning_rate was 0.001 there and is 0.5"):
        train(other, workdir, verbose=False)
    # Where and how often may change.
    train(replace(config, checkpoint={"keep": 1}, evaluation={"every_steps": 4}), workdir, verbose=False)
    train(config, workdir, verbose=False)


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_damaged_checkpoint_is_named(tiny_run, tmp_path, damage):
    train(tiny_run, tmp_path, verbose=False)
    data = [p for p in (tmp_path / "checkpoints" / "12" / "params").rglob("*") if p.is_file() and "d" in p.parts]
    largest = max(data, key=lambda p: p.stat().st_size)
    if damage == "truncate":
        os.truncate(largest, largest.stat().st_size // 2)
    else:
        largest.unlink()
    with pytest.raises(UserError, match=r"checkpoints/12 cannot be read; remove that folder"):
        lsjax.load(tmp_path)
    with pytest.raises(UserError, match=r"checkpoints/12 cannot be read; remove that folder"):
        train(tiny_run, tmp_path, verbose=False)


def test_bad_meshes_are_named(tiny_run, tmp_path):
    with pytest.raises(UserError, match="does not fit 8 device"):
        train(replace(tiny_run, mesh={"data": 3}), tmp_path, verbose=False)
    with pytest.raises(UserError, match="do not divide over data x fsdp"):
        train(replace(tiny_run, training={"batch_size": 12}), tmp_path, verbose=False)
    with pytest.raises(UserError, match=r"config.mesh.tensor .* does not divide"):
        train(replace(tiny_run, mesh={"data": 2, "tensor": 4}), tmp_path, verbose=False)


def test_a_rejected_run_does_not_claim_its_workdir(tiny_run, tmp_path):
    with pytest.raises(UserError, match="neither"):
        train(replace(tiny_run, data={"corpus": "/nowhere"}), tmp_path, verbose=False)
    with pytest.raises(UserError, match=r"config.mesh.tensor"):
        train(replace(tiny_run, mesh={"data": 2, "tensor": 4}), tmp_path, verbose=False)
    assert list(tmp_path.iterdir()) == []
    train(replace(tiny_run, training={"total_steps": 2}), tmp_path, verbose=False)


def test_text_that_changed_under_a_run_is_noticed(tiny_run, tmp_path, text_folder):
    changing = tmp_path / "text"
    shutil.copytree(text_folder, changing)
    config = replace(tiny_run, data={"corpus": str(changing)}, training={"total_steps": 2})
    train(config, tmp_path / "run", verbose=False)
    shutil.rmtree(tmp_path / "run" / "data")
    (changing / "argparse.py").write_text("entirely = 'different'\n" * 2000)
    with pytest.raises(UserError, match="the corpus has changed since the run began"):
        train(config, tmp_path / "run", verbose=False)


def test_a_profile_traces_the_steps_asked_for(tiny_run, tmp_path):
    import gzip

    train(tiny_run, tmp_path, verbose=False, profile_steps=2)
    (path,) = (tmp_path / "profile").glob("**/*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert {event["args"]["step_num"] for event in events if event.get("name") == "train"} == {"3", "4"}
    assert any("train_step" in event.get("name", "") for event in events)


def test_a_run_without_tensorboardx_says_so_and_writes_the_rest(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    log = RunLog(tmp_path, 0)
    log.write_step({"step": 1, "loss": 2.0})
    log.close()
    assert "no TensorBoard events are written" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'
    assert not (tmp_path / "tensorboard").exists()
