"""Ctrl-C and SIGTERM while `lsjax demo` and `lsjax ablate` train: their own status, and the same command goes on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import process_environment
from tests.helpers.recorded import RECORDED

CONFIG = """
import lsjax
from lsjax.config import default_config

def get_config():
    config = default_config()
    config.initial_model = {model!r}
    config.model.update(lsjax.read_model_config({model!r}).to_dict())
    config.model.context_length = 128
    config.layerskip.update(dropout_max_rate=0.0, exit_curriculum="none", draft_exit=1, exit_weight_floor=0.5)
    config.data.update(corpus={corpus!r}, held_out_fraction=0.2)
    config.training.update(total_steps=1_000_000, batch_size=8, sequence_length=16, warmup_steps=1, log_every_steps=1)
    config.training.compute_dtype = "float32"
    config.evaluation.max_batches = 1
    return config
"""
COMMANDS = {  # the flags of each command, the folder of its run, and what it writes at the end
    "demo": (["--num_speculations=1"], ".", "report.json"),
    "ablate": (["--recipes=none"], "none/seed0", "ablation.png"),
}


def start(command: str, folder: Path, *flags: str) -> subprocess.Popen:
    arguments = [command, f"--config={folder}/config.py", f"--workdir={folder}/run", *COMMANDS[command][0], *flags]
    return subprocess.Popen(
        [sys.executable, "-m", "lsjax", *arguments], env=process_environment(JAX_PLATFORMS="cpu"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_saves_and_the_same_command_goes_on(command, number, text_folder, tmp_path):
    (tmp_path / "config.py").write_text(CONFIG.format(model=str(RECORDED / "llama32"), corpus=str(text_folder)))
    run, result = tmp_path / "run" / COMMANDS[command][1], tmp_path / "run" / COMMANDS[command][2]
    process = start(command, tmp_path)
    while len(steps(run)) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    last = steps(run)[-1]
    assert process.returncode == 128 + number, err
    assert out.splitlines()[-1] == f"interrupted: saved at step {last}; the same command resumes from there"
    assert err == ""
    assert not result.exists()

    again = start(command, tmp_path, f"--config.training.total_steps={last + 2}")
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert f"resuming at step {last}" in out
    assert steps(run) == list(range(1, last + 3))
    assert result.exists()
