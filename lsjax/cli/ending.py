"""The ways in which a command ends early: a signal, or an output that is closed, full or read by nobody."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from lsjax.files import remove_unfinished

BAD_INPUT = 2
_NO_READER = 1
_SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


def run_to_the_end(program: str, run: Callable[[], int]) -> int:
    """Returns the exit status of `run`, whatever ends it.

    SIGINT, SIGTERM and SIGHUP end the process with 128 plus their number, and leave nothing half-written; a command
    that saves first handles them itself. When the reader of its output has gone, as in `lsjax --help | head -1`, the
    command ends silently with status 1. Any other failure of the system, such as a full disk behind standard output,
    is one line and status 2.

    program: the name before that line.
    """
    _open_closed_streams()
    try:
        with _signals_handled(program):
            status = run()
            sys.stdout.flush()  # the last that is printed may wait there, and fail only now
            return status
    except KeyboardInterrupt:  # of a command that handles signals itself
        say(program, "interrupted")
        return 128 + signal.SIGINT
    except SystemExit as end:  # likewise
        if type(end.code) is int and end.code > 128:
            say(program, "interrupted")
        raise
    except BrokenPipeError:
        _discard_output(sys.stdout, sys.stderr)
        return _NO_READER
    except OSError as error:
        place = error.filename or "standard output, or a temporary file"
        _discard_output(sys.stdout)
        say(program, f"cannot go on, {place}: {error.strerror or error}")
        return BAD_INPUT


def say(program: str, message: object) -> None:
    """Prints one line about the end of a command on standard error, after what the command has printed."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        print(f"{program}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _signals_handled(program: str) -> Iterator[None]:
    def end(number: int, _: Any) -> None:
        remove_unfinished()
        with contextlib.suppress(Exception):  # the signal may have come in the middle of a print
            sys.stdout.flush()
        with contextlib.suppress(OSError):
            os.write(2, f"{program}: interrupted\n".encode())
        os._exit(128 + number)  # an exception could get lost: Python drops those raised inside some callbacks

    before = {}
    for number in _SIGNALS:
        # A signal that is ignored, as SIGHUP is under nohup, stays ignored.
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            with contextlib.suppress(ValueError):  # only the main thread can handle signals
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _open_closed_streams() -> None:
    """Gives a process that was started without standard output or error (>&-) streams that keep nothing."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the next file that is opened would take its place, and what libraries print
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (open until the process ends)


def _discard_output(*streams: Any) -> None:
    """Drops what the streams still hold. Python would try again to write it at its end, and complain."""
    for stream in streams:
        with contextlib.suppress(OSError, ValueError):  # a stream without a file, as in tests
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
