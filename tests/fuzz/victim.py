"""Processes, of training or of any command, for tests that end them, start them twice, or fill their disk."""

import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import tests.conftest  # noqa: F401 (the devices and the compiler's flags of all tests)
from lsjax.cli.main import main
from lsjax.config import Config
from lsjax.errors import UserError
from lsjax.training.loop import train
from tests.fuzz.harness import WALL_LIMIT

# Processes are forked from a server that has imported this module, so that instants are of training and not of imports.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.fuzz.victim"])

_PROCESSOR_LIMIT = 300  # seconds of processor time of one process


def start(config: Config, workdir: Path, log: Path, file_limit: int | None = None) -> Any:
    """Starts a process that trains; its standard error is appended to `log`.

    file_limit: the most bytes of a file that it may write, as if the disk were full.
    """
    process = CONTEXT.Process(target=_train, args=(config.to_dict(), str(workdir), str(log), file_limit))
    process.start()
    return process


def start_command(arguments: list[str], output: Path, errors: Path) -> Any:
    """Starts a process that is the program `lsjax` with these arguments, its output and errors in files."""
    process = CONTEXT.Process(target=_run_command, args=(arguments, str(output), str(errors)))
    process.start()
    return process


def exit_status(process: Any) -> int:
    """Waits for the end of a process and returns its exit status. Fails when it hangs."""
    process.join(WALL_LIMIT)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"still running after {WALL_LIMIT} s")
    assert process.exitcode != -signal.SIGXCPU, f"still running after {_PROCESSOR_LIMIT} s of processor time"
    return process.exitcode


def _run_command(arguments: list[str], output: str, errors: str) -> None:
    _limit_processor_time()
    for number, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    sys.exit(main(arguments))


def _train(tree: dict, workdir: str, log: str, file_limit: int | None) -> None:
    _limit_processor_time()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 2)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    if file_limit is not None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, hard))
    try:
        train(Config.from_dict(tree), workdir, verbose=False)
    except UserError as error:
        if file_limit is not None:  # the log is not on the full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        print(f"train: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def _limit_processor_time() -> None:
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (_PROCESSOR_LIMIT, hard))
