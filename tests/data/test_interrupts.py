"""Interrupts `lsjax prepare` in real processes: a prompt end, one line, no process left, the same bytes in the end."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lsjax.cli.main import main
from lsjax.data import corpus
from tests.cli.test_prepare import TINY
from tests.conftest import process_environment

BLOCK = 20_000
LINE = "interrupted: run the same command again to go on from here\n"

# The packing processes import this file too. A block that is not among the first takes minutes.
SCRIPT = """
import sys, time
from lsjax.data import corpus, packing, prepare

corpus.BLOCK_BYTES = prepare.BLOCK_BYTES = {block}
prepare.core_count = lambda: {workers}
write_part = packing.write_part

def slowly(folder, part):
    if part.unit >= {quick}:
        time.sleep(300)
    write_part(folder, part)

packing.write_part = slowly

if __name__ == "__main__":
    from lsjax.cli.main import main
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def command(text_folder, tmp_path):
    return ["prepare", *TINY, f"--config.data.corpus={text_folder}", f"--workdir={tmp_path}/run"]


def processes_of(session: int) -> list[int]:
    """Returns the processes of a session that have not ended."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, owner, *_ = status.read_text().rpartition(")")[2].split()
        except (OSError, ValueError):  # it ended meanwhile
            continue
        if int(owner) == session and state != "Z":
            found.append(int(status.parent.name))
    return found


def interrupt(command, folder, number, *, whole_group, workers=3, quick=2) -> None:
    """Starts a preparation, and signals it when `quick` blocks are done, or its processes have just started."""
    script = folder / "slow.py"
    script.write_text(SCRIPT.format(block=BLOCK, workers=workers, quick=quick))
    process = subprocess.Popen(
        [sys.executable, str(script), *command],
        env=process_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        partial = folder / "run" / "data.partial"
        deadline = time.monotonic() + 120
        count = workers + 2 if workers > 1 else 1  # with several workers, one more process keeps track of semaphores
        while len(list(partial.glob("part-*.json"))) < quick or len(processes_of(process.pid)) < count:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (os.killpg if whole_group else os.kill)(process.pid, number)
        _, err = process.communicate(timeout=60)  # far less than a block takes
        assert process.returncode == 128 + number, err
        assert err == LINE
        while processes_of(process.pid):
            assert time.monotonic() < deadline, "a process is left"
            time.sleep(0.01)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert not (folder / "run" / "data").exists()


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_rest(command, folder, monkeypatch):
    """Completes a preparation, and compares it with one that nothing interrupted."""
    monkeypatch.setattr(corpus, "BLOCK_BYTES", BLOCK)
    assert main(command) == 0
    assert main([*command[:-1], f"--workdir={folder}/whole"]) == 0
    assert content(folder / "run" / "data") == content(folder / "whole" / "data")


def test_ctrl_c_ends_all_processes_at_once_and_nothing_is_lost(command, tmp_path, monkeypatch, capsys):
    interrupt(command, tmp_path, signal.SIGINT, whole_group=True)
    check_rest(command, tmp_path, monkeypatch)
    assert "going on where an earlier preparation was" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [True, False])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("workers", "quick"), [(1, 2), (3, 0), (3, 2)])
def test_signals_end_all_processes_at_once(command, tmp_path, monkeypatch, number, whole_group, workers, quick):
    interrupt(command, tmp_path, number, whole_group=whole_group, workers=workers, quick=quick)
    check_rest(command, tmp_path, monkeypatch)
