"""Runs Python programs that a model wrote, each in a process of its own with few rights.

The process gives up its rights before it runs the program (sandbox_child.py). No step needs root, and none is skipped:
where one is not possible, nothing runs.

  files: Landlock (Linux 5.13). The program writes only below a new temporary folder, which is removed afterwards. It
    reads only that folder, the interpreter's standard library and the system's libraries.
  network, processes, threads, signals, attributes of files: seccomp. Only the system calls that plain Python needs are
    allowed; any other one raises PermissionError in the program.
  memory: RLIMIT_AS. size of a file: RLIMIT_FSIZE, 16 MB; how much many files hold together is not limited.
  time: this process kills the program's process group. RLIMIT_CPU, and a signal when this process dies, come on top.
  environment: empty, and site-packages are left out, so a program has the standard library alone.

A program is not kept from claiming that it passed: it runs in the process that reports the outcome. This protects the
machine, not the score.
"""

import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from lsjax.errors import UserError

_CHILD = Path(__file__).with_name("sandbox_child.py")
_START_SECONDS = 60.0  # for the interpreter to start on a busy machine; the program's own time begins afterwards
_LONGEST_REPORT = 2**16  # what a pipe holds: a program that writes more into it waits until its time is over
_READY = "ready"


class Outcome(NamedTuple):
    """The outcome of a program. passed: it came to its end. detail: otherwise what ended it, in one line."""

    passed: bool
    detail: str = ""


def check_sandbox() -> None:
    """Raises UserError, with the reason, when programs cannot be run safely on this machine."""
    outcome = run_program("import math, typing, hashlib", seconds=30.0)
    if not outcome.passed:
        raise UserError(f"the sandbox for generated code does not work here: {outcome.detail}")


def run_program(program: str, seconds: float = 3.0, memory_bytes: int = 2**30) -> Outcome:
    """Runs a program for at most `seconds` with at most `memory_bytes` of address space.

    Raises UserError when there is no sandbox on this machine.
    """
    if not sys.platform.startswith("linux"):
        raise UserError("generated code runs only on Linux, whose Landlock and seccomp keep it in its folder")
    limits = [str(memory_bytes), str(math.ceil(seconds) + 1)]
    command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(_CHILD), *limits]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as source:
        source.write(program.encode(errors="replace"))
        source.seek(0)
        process = subprocess.Popen(
            command,
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            return _watch(process, seconds)
        finally:
            _kill(process)


def _watch(process: subprocess.Popen[bytes], seconds: float) -> Outcome:
    """Waits for the end of a program or of its time."""
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    first, _, rest = _read(pipe, _START_SECONDS).partition(b"\n")
    message = _parse(first)
    if message != _READY:
        reason = message["refused"] if isinstance(message, dict) else "the interpreter did not start"
        raise UserError(f"there is no sandbox for generated code on this machine: {reason}")
    try:
        status = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return Outcome(False, f"it ran for more than {seconds:g} s")
    message = _parse(rest + _read(pipe, 0.0))
    if not isinstance(message, dict) or "error" not in message:
        return Outcome(False, f"it ended its process (status {status})")
    return Outcome(message["error"] is None, str(message["error"] or ""))


def _read(pipe: int, seconds: float) -> bytes:
    """Returns what is in a pipe, after waiting at most `seconds` for something."""
    return os.read(pipe, _LONGEST_REPORT) if select.select([pipe], [], [], seconds)[0] else b""


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a process with its whole group, and waits until it has gone."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout:
        process.stdout.close()
