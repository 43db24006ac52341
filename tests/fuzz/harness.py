"""Runs one malformed input and judges what came of it.

An input passes when it is refused in one line (UserError, or exit status 2), or when its result is accepted by a check
that knows the right answer from elsewhere. Nothing else passes: no other exception, no warning, no text on standard
error beside that line, no hang, no gigabytes of memory, and no file left behind.
"""

import contextlib
import faulthandler
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lsjax.errors import UserError

REFUSED, VALID = "refused", "valid"
PROCESSOR_LIMIT = 60  # seconds of processor time of one input: the same on a machine that others use too
WALL_LIMIT = 1200  # seconds until an input that sleeps, or waits for a process of its own, counts as a hang
_MEMORY = 12 << 30  # bytes of address space that inputs may take beyond what the process has when they begin
_LONGEST_MESSAGE = 2000


class Case(NamedTuple):
    """One malformed input.

    name: says what is malformed.
    call: runs the input, given the shared parts and an empty folder of its own.
    check: raises AssertionError unless a result is right, given the shared parts and the result; None when every
      result is wrong, so that only a refusal passes.
    quiet: whether a run that succeeds must print nothing on standard error.
    outputs: names in the folder that a run which succeeds may write.
    touched: names, or beginnings of paths, in the folder that a refusal may have changed.
    """

    name: str
    call: Callable[[Any, Path], Any]
    check: Callable[[Any, Any], None] | None = None
    quiet: bool = True
    outputs: tuple[str, ...] = ()
    touched: tuple[str, ...] = ()


class Hang(BaseException):
    """Raised in an input that takes too long."""


def judge(
    case: Case,
    parts: Any,
    folder: Path,
    read_errors: Callable[[], str],
    processor_limit: float = PROCESSOR_LIMIT,
    wall_limit: float = WALL_LIMIT,
) -> str:
    """Runs a case and returns REFUSED or VALID; fails when the outcome is neither.

    folder: an empty folder; what is in it after `case.call` prepared its files must not change unless it is an output.
    read_errors: returns what has been written to standard error since the last call.
    """
    read_errors()
    watch = Watch(folder)
    with (
        time_limit(processor_limit, wall_limit) as clock,
        warnings.catch_warnings(record=True) as warned,
        watch.temporary_folder(),
    ):
        warnings.simplefilter("always")  # all but those that Python shows to nobody
        for unseen in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", unseen)
        try:
            result = case.call(parts, watch)
            message, outcome = "", VALID
        except UserError as error:
            result, message, outcome = None, str(error), REFUSED
        except Hang:
            result, message, outcome = None, "", "hang"
    errors = read_errors()
    if isinstance(result, Exit):
        assert result.status in (0, 2), f"{case.name}: exit status {result.status}, and says {errors[-2000:]!r}"
        if result.status == 2:
            message, outcome, errors = errors, REFUSED, ""
    assert not clock.expired, f"{case.name}: still running after {clock.expired}"
    assert not warned, f"{case.name}: warns: {[str(w.message)[:300] for w in warned]}"
    assert "Traceback" not in errors, f"{case.name}: prints a traceback: {errors[-3000:]}"
    if outcome == REFUSED:
        check_message(case.name, message)
        assert not errors, f"{case.name}: prints more than its one line: {errors[:3000]!r}"
        left = [path for path in watch.changes() if not path.startswith(case.touched or "\0")]
        assert not left, f"{case.name}: refused, but leaves behind {left}"
        return outcome
    assert case.check is not None, f"{case.name}: accepted, with the result {str(result)[:300]}"
    assert not (case.quiet and errors), f"{case.name}: succeeds, but prints {errors[:3000]!r}"
    case.check(parts, result)
    left = [path for path in watch.changes() if Path(path).parts[0] not in case.outputs]
    assert not left, f"{case.name}: leaves behind {left}"
    return outcome


class Exit(NamedTuple):
    """How a command ended. After exit status 2 standard error must hold one line."""

    status: int


def check_message(name: str, message: str) -> None:
    """Fails unless a message is one readable line."""
    assert message.strip(), f"{name}: refused without a word"
    assert "\n" not in message.strip(), f"{name}: its message has several lines: {message!r}"
    assert len(message) <= _LONGEST_MESSAGE, f"{name}: its message has {len(message)} characters: {message[:300]!r} ..."
    assert "Traceback" not in message


class Watch:
    """The folder of a case, and what changes in it after the case has prepared its files."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "temporary").mkdir()
        (folder / "here").mkdir()
        self.prepared()

    def prepared(self) -> None:
        """Remembers the folder as it is now."""
        self._before = self._listing()

    def changes(self) -> list[str]:
        """Returns the paths that have appeared, vanished or changed since `prepared`."""
        now = self._listing()
        return sorted(path for path in now.keys() | self._before.keys() if now.get(path) != self._before.get(path))

    @contextlib.contextmanager
    def temporary_folder(self) -> Iterator[None]:
        """Makes the folder's own parts the current directory and the place of temporary files."""
        before, here = tempfile.tempdir, Path.cwd()
        tempfile.tempdir = str(self.folder / "temporary")
        os.chdir(self.folder / "here")
        try:
            yield
        finally:
            os.chdir(here)
            tempfile.tempdir = before

    def _listing(self) -> dict[str, tuple]:
        found = {}
        for path in self.folder.rglob("*"):
            status = path.lstat()
            size = None if path.is_dir() else (status.st_size, status.st_mtime_ns)
            found[os.fsencode(path.relative_to(self.folder)).decode(errors="replace")] = (status.st_mode, size)
        return found


class Clock:
    """Which limit an input has passed, even where it swallowed the exception that says so; empty for none."""

    expired = ""


@contextlib.contextmanager
def time_limit(processor: float = PROCESSOR_LIMIT, wall: float = WALL_LIMIT) -> Iterator[Clock]:
    """Raises Hang in the main thread after some seconds of processor time of this process, or of wall-clock time.

    Ends the process when the input does not return to Python a minute after the second limit.
    """
    clock = Clock()
    limits = {
        signal.SIGPROF: (signal.ITIMER_PROF, processor, f"{processor} s of processor time"),
        signal.SIGALRM: (signal.ITIMER_REAL, wall, f"{wall} s"),
    }

    def expire(number: int, _: Any) -> None:
        clock.expired = limits[signal.Signals(number)][2]
        raise Hang

    previous = {number: signal.signal(number, expire) for number in limits}
    for timer, seconds, _ in limits.values():
        signal.setitimer(timer, seconds)
    faulthandler.dump_traceback_later(wall + 60, exit=True)
    try:
        yield clock
    finally:
        for number, (timer, _, _) in limits.items():
            signal.setitimer(timer, 0)
            signal.signal(number, previous[number])
        faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def memory_limit() -> Iterator[None]:
    """Makes an input that asks for a great deal of memory fail, and not the machine."""
    if not sys.platform.startswith("linux"):
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Returns whether a condition came true within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return condition()
