"""The sandbox for generated code: a program keeps to its folder, its time, its memory and its process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lsjax.errors import UserError
from lsjax.evaluation import sandbox
from lsjax.evaluation.sandbox import Outcome, check_sandbox, run_program

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module", autouse=True)
def working_sandbox():
    try:
        check_sandbox()
    except UserError as error:  # such as an old kernel
        pytest.skip(str(error))


@pytest.fixture
def started(monkeypatch):
    """Returns a list that gets every process that is started."""
    processes, popen = [], subprocess.Popen

    def start(*arguments, **settings):
        processes.append(popen(*arguments, **settings))
        return processes[-1]

    monkeypatch.setattr(sandbox.subprocess, "Popen", start)
    return processes


PLAIN = """
import collections, dataclasses, datetime, decimal, functools, hashlib, heapq, itertools, json, math, random, re, typing
@dataclasses.dataclass
class Point:
    x: int = 3
assert hashlib.md5(str(Point().x).encode()).hexdigest() and math.gcd(4, 6) == 2 and datetime.datetime.now()
"""


def test_plain_python_runs():
    assert run_program(PLAIN) == Outcome(True)


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "it ended its process (status 0)"),
        ("import ctypes; ctypes.string_at(0)", "it ended its process"),
        ("import jax", "ModuleNotFoundError"),
        ("import os; assert not dict(os.environ), dict(os.environ); assert 0", "AssertionError: "),
    ],
)
def test_a_program_that_does_not_come_to_its_end_has_not_passed(program, detail):
    outcome = run_program(program)
    assert not outcome.passed
    assert outcome.detail.startswith(detail)


REFUSED = {
    "a process": "import os; os.fork()",
    "a command": "import subprocess; subprocess.run(['true'])",
    "another program in its place": "import os; os.execv('/bin/true', ['true'])",
    "a signal to another process": "import os, signal; os.kill(os.getppid(), signal.SIGTERM)",
    "a session that its group's end would not reach": "import os; os.setsid()",
    "an owner who gets signals": "import fcntl; fcntl.fcntl(0, fcntl.F_SETOWN, 1)",
    "a socket": "import socket; socket.socket()",
    "a socket of this machine": "import socket; socket.socket(socket.AF_UNIX)",
    "writing to /etc": "open('/etc/lsjax-was-here', 'w')",
    "writing beside its folder": "open('../lsjax-was-here', 'w')",
    "writing to a home folder": "import sys; open(sys.argv[0], 'a')",
    "reading a home folder": "open({home!r})",
    "removing a file": "import os; os.unlink({home!r})",
    "moving a file in": "import os; os.rename({home!r}, 'mine')",
    "a link to a file": "import os; os.link({home!r}, 'mine')",
    "attributes of a file": "import os; os.chmod({home!r}, 0o777)",
    "more memory": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_machine_is_out_of_reach(name, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("secret")
    mine.chmod(0o600)
    outcome = run_program(REFUSED[name].format(home=str(mine)))
    assert outcome.detail.startswith("PermissionError: "), outcome
    assert mine.read_text() == "secret"
    assert mine.stat().st_mode & 0o777 == 0o600
    assert not Path("/etc/lsjax-was-here").exists()


def test_no_thread_starts():
    assert run_program("import threading; threading.Thread(target=print).start()").detail.startswith("RuntimeError")


def test_memory_and_files_have_limits():
    assert run_program("bytearray(2**29)", memory_bytes=2**28).detail.startswith("MemoryError")
    assert run_program("bytearray(2**29)", memory_bytes=2**30).passed
    write = "with open('big', 'wb') as file: file.write(bytes(2**24{}))"
    assert run_program(write.format("")).passed
    assert run_program(write.format(" + 1")).detail == "OSError: [Errno 27] File too large"


def test_a_program_writes_to_its_folder_which_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    write = "import os; os.mkdir('d'); open('a', 'w').write('b'); os.rename('a', 'd/c')"
    assert run_program(f"{write}; assert open('d/c').read() == 'b'") == Outcome(True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "program",
    [
        "import time; time.sleep(60)",
        "while True: pass",
        "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (2, 15)]; time.sleep(60)",
        "import os\nwhile True: os.write(3, bytes(1000))",  # the pipe of the outcome
    ],
)
def test_a_program_does_not_outlive_its_time(program, started):
    began = time.monotonic()
    outcome = run_program(program, seconds=0.3)
    assert time.monotonic() - began < 30
    assert outcome == Outcome(False, "it ran for more than 0.3 s")
    (process,) = started
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_a_program_does_not_outlive_the_process_that_watches_it():
    code = "from lsjax.evaluation.sandbox import run_program; run_program('import time; time.sleep(60)', seconds=60)"
    watcher = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    children = Path(f"/proc/{watcher.pid}/task/{watcher.pid}/children")
    pid = _wait_for(lambda: children.read_text().split())[0]
    _wait_for(lambda: "Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text())  # it has given up its rights
    watcher.kill()
    watcher.wait()
    _wait_for(lambda: not Path(f"/proc/{pid}").exists() or "State:\tZ" in Path(f"/proc/{pid}/status").read_text())


def _wait_for(condition):
    deadline = time.monotonic() + 30
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


def test_where_there_is_no_sandbox_nothing_runs(tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    child.write_text('print(\'{"refused": "this kernel has no Landlock"}\')')
    monkeypatch.setattr(sandbox, "_CHILD", child)
    with pytest.raises(UserError, match="there is no sandbox for generated code on this machine: this kernel has no"):
        run_program("1")
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(UserError, match="runs only on Linux"):
        run_program("1")
