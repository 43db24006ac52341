"""Commands that a signal ends at a random instant: their status, what they leave, and the same command again."""

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import lsjax
from tests.fuzz import victim
from tests.fuzz.harness import WALL_LIMIT, wait_until
from tests.fuzz.parts import TINY_CONFIG_FILE, Parts, same_params

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Each command with what it writes. {out} is that place; the others are parts and small files.
COMMANDS: dict[str, list[str]] = {
    "train": ["--config={tiny}", "--workdir={out}"],
    "prepare": ["--config={tiny}", "--config.data.directory={out}"],
    "convert": ["--from={huggingface}", "--to={out}"],
    "generate": ["--model={huggingface}", "--prompts={prompts}", "--output={out}", "--max_new_tokens=4"],
    "evaluate": ["--model={huggingface}", "--tasks=custom:{task}", "--report={out}", "--max_new_tokens=4",
                 "--strategies=autoregressive,early_exit:1"],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_a_signal_ends_says_so_and_the_same_command_goes_on(command, parts, request, tmp_path):
    all_inputs = request.config.getoption("--all-inputs", default=False)
    if not all_inputs and command != "convert":
        pytest.skip("make test-fuzz runs all of them")
    known = _files(parts, tmp_path)
    began = time.monotonic()
    good = _run(command, known | {"out": tmp_path / "good"}, tmp_path / "log")
    assert good == 0, (tmp_path / "log").read_text()
    seconds, rng = time.monotonic() - began, random.Random(command)
    for number in range(6 if all_inputs else 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        ended = _SIGNALS[number % 3]
        status = _run(command, known | {"out": folder / "out"}, folder / "log", ended, rng.uniform(0, seconds))
        text = (folder / "log").read_text()
        assert status in (0, 128 + ended), text[-2000:]
        assert "Traceback" not in text
        assert not status or "interrupted" in text + (folder / "printed").read_text(), text
        _check_whole(command, folder / "out")
        again = _run(command, known | {"out": folder / "out"}, folder / "log")
        if command == "generate" and (folder / "out").exists():  # it never writes over results
            assert again == 2 or (folder / "out").stat().st_size
        else:
            assert again == 0 or (command == "convert" and not status), (folder / "log").read_text()
            _check_same(command, folder / "out", tmp_path / "good")
        left = [path.name for path in folder.iterdir() if path.name not in ("out", "log", "printed")]
        assert not left, f"{command} leaves {left} behind"


def _files(parts: Parts, folder: Path) -> dict[str, Path]:
    """Returns the files that commands read, by the names in COMMANDS."""
    tiny, task = folder / "tiny.py", folder / "task.jsonl"
    tiny.write_text(TINY_CONFIG_FILE.format(corpus=str(parts.corpus)))
    task.write_text("".join(json.dumps({"prompt": text, "reference": text}) + "\n" for text in ("a = 1", "import os")))
    return {"tiny": tiny, "task": task, "huggingface": parts.huggingface, "prompts": parts.prompts}


def _run(command: str, known: dict[str, Path], log: Path, ended: int | None = None, seconds: float = 0.0) -> int:
    """Runs a command, sends it a signal after some seconds, and returns its exit status."""
    arguments = [argument.format(**known) for argument in COMMANDS[command]]
    process = victim.start_command([command, *arguments], log.with_name("printed"), log)
    if ended is not None:
        # Before it handles signals they end it as any process.
        assert wait_until(lambda: not process.is_alive() or _handles_signals(process.pid), WALL_LIMIT)
        process.join(seconds)
        if process.is_alive():
            os.kill(process.pid, ended)
    return victim.exit_status(process)


def _handles_signals(process: int) -> bool:
    """Returns whether a process has a handler of its own for SIGTERM."""
    if not sys.platform.startswith("linux"):
        time.sleep(0.3)
        return True
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process}/status").read_text())
    return bool(caught and int(caught[1], 16) >> signal.SIGTERM - 1 & 1)


def _check_whole(command: str, out: Path) -> None:
    """Fails when something is half-written."""
    if command in ("generate", "evaluate") and out.exists():
        text = out.read_text()
        lines = text.splitlines() if command == "generate" else [text]
        assert all(isinstance(json.loads(line), dict) for line in lines)
        assert command != "generate" or not text or text.endswith("\n")
    if command == "convert" and out.exists():
        assert (out / "model.safetensors").is_file()
        assert (out / "config.json").is_file()


def _check_same(command: str, out: Path, good: Path) -> None:
    """Fails unless a command that was ended once has written what one that was not wrote."""
    if command == "convert":
        assert {path.name: path.read_bytes() for path in out.iterdir()} == {
            path.name: path.read_bytes() for path in good.iterdir()
        }
    elif command == "evaluate":
        rows, wanted = (json.loads(path.read_text())["rows"] for path in (out, good))
        assert [(row["task"], row["strategy"], row["sha256"]) for row in rows] == [
            (row["task"], row["strategy"], row["sha256"]) for row in wanted
        ]
    elif command == "prepare":
        found = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".arrayrecord"}
        assert found == {path.name: path.read_bytes() for path in good.iterdir() if path.suffix == ".arrayrecord"}
    elif command == "train":
        assert same_params(lsjax.load(out).params, lsjax.load(good).params)
        assert np.isfinite(json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["loss"])
        shutil.rmtree(out)
