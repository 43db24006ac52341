"""Commands end well where their output cannot be written, nobody reads it, or a signal comes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = (sys.executable, "-m", "lsjax")
ROOT = Path(__file__).parent.parent.parent


def shell(command: str) -> subprocess.CompletedProcess:
    """Runs a line of shell, in which $LSJAX is the program."""
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        env=os.environ | {"LSJAX": " ".join(PROGRAM)}, capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("command", ["$LSJAX --help", "$LSJAX generate --help", "$LSJAX --version"])
def test_a_reader_that_has_gone_ends_a_command_silently(command):
    run = shell(f"( sleep 0.3; {command} ) | true")
    assert (run.returncode, run.stderr) == (1, "")


@pytest.mark.parametrize("command", ["$LSJAX --help", "$LSJAX generate --help"])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_disk_behind_standard_output_is_one_line(command):
    run = shell(f"{command} > /dev/full")
    assert (run.returncode, run.stderr) == (
        2, "lsjax: cannot go on, standard output, or a temporary file: No space left on device\n"
    )  # fmt: skip


@pytest.mark.parametrize("closed", [">&-", "<&-", "<&- >&-"])
def test_closed_streams_do_not_matter(closed):
    run = shell(f"$LSJAX generate --model=nowhere {closed}")
    assert (run.returncode, run.stderr) == (2, "lsjax generate: give --prompt=TEXT or --prompts=FILE.jsonl\n")
    assert shell(f"$LSJAX --version {closed}").returncode == 0


def test_no_output_at_all_leaves_the_status():
    run = shell("$LSJAX generate --model=nowhere <&- >&- 2>&-")
    assert (run.returncode, run.stdout, run.stderr) == (2, "", "")


# A command that writes a folder, and waits in the middle of it.
_WRITES = """
import sys, time
from pathlib import Path
from lsjax.cli.ending import run_to_the_end
from lsjax.files import scratch_folder, unfinished

def write():
    target = Path(sys.argv[1])
    with scratch_folder(target) as scratch, unfinished(target.with_name(".half")):
        (scratch / "weights").write_text("half")
        target.with_name(".half").write_text("half")
        print("ready", flush=True)
        time.sleep(60)
    return 0

sys.exit(run_to_the_end("lsjax convert", write))
"""


def start_writing(target: Path, prefix: tuple[str, ...] = ()) -> subprocess.Popen:
    """Starts a command that writes `target`, and returns it when it is in the middle."""
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", _WRITES, target], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while (line := process.stdout.readline()) != "ready\n":
        assert line, process.stderr.read()
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_with_its_own_status_and_nothing_half_written(number, tmp_path):
    process = start_writing(tmp_path / "model")
    process.send_signal(number)
    assert process.communicate(timeout=30)[1] == "lsjax convert: interrupted\n"
    assert process.returncode == 128 + number
    assert not list(tmp_path.iterdir())


def test_a_hang_up_is_ignored_under_nohup(tmp_path):
    process = start_writing(tmp_path / "model", ("nohup",))
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.kill()
    process.communicate()


def test_what_a_killed_process_left_is_removed_by_the_next_one_and_what_another_one_writes_is_not(tmp_path):
    killed, running = start_writing(tmp_path / "model"), start_writing(tmp_path / "model")
    killed.kill()
    killed.communicate()
    assert len(list(tmp_path.glob(".model.*"))) == 2
    last = start_writing(tmp_path / "model")
    assert len(list(tmp_path.glob(".model.*"))) == 2  # those of the two that run
    for process in (running, last):
        process.terminate()
        process.communicate()
    assert not list(tmp_path.glob(".model.*"))
