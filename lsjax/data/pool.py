"""Packs blocks on all cores: one process per core, each with a tokenizer of its own."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from pathlib import Path

from lsjax.data.corpus import Block
from lsjax.data.packing import Job, pack_block
from lsjax.data.parts import Part
from lsjax.data.tokenizer import Tokenizer
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.errors import UserError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SECONDS = 0.2  # between two looks at signals
_WAITING_BLOCKS = 2  # beside one block per process; a block of a stream holds its text


def core_count() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pack_blocks(
    blocks: Iterable[Block],
    job: Job,
    tokenizer: Path,
    workers: int,
    report: Callable[[Block, Part], None],
) -> None:
    """Packs blocks and calls `report` after each, in the order in which they are done.

    tokenizer: its folder. workers: processes; 1 packs in this one, where the
    tokenizer uses all cores by itself.

    Raises UserError of the first block that fails; blocks that are done stay. SIGINT and SIGTERM end the processes at
    once, without the blocks that they are at, and raise KeyboardInterrupt or SystemExit with status 143.
    """
    if workers == 1:
        loaded = open_tokenizer(tokenizer, job.vocab_size)
        for block in blocks:
            report(block, pack_block(block, job, loaded))
        return
    running: dict[Future, Block] = {}
    with _signals_held() as signals, _pool(job, tokenizer, workers) as pool:
        for block in blocks:
            with _signals_blocked():  # submitting starts the processes
                future = pool.submit(_pack, block)
            running[future] = block._replace(pieces=())
            if len(running) >= workers + _WAITING_BLOCKS:
                _collect(running, report, signals)
        while running:
            _collect(running, report, signals)


def open_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """Loads the tokenizer of a preparation for an embedding of vocab_size rows."""
    tokenizer = load_tokenizer(folder)
    tokenizer.restrict_to(vocab_size, str(folder))
    return tokenizer


def _collect(running: dict[Future, Block], report: Callable[[Block, Part], None], signals: Sequence[int]) -> None:
    done: set[Future] = set()
    while not done:
        if signals:
            raise _InterruptedError
        done, _ = wait(running, _SECONDS, FIRST_COMPLETED)
    for future in done:
        report(running.pop(future), future.result())


@contextlib.contextmanager
def _pool(job: Job, tokenizer: Path, workers: int) -> Iterator[ProcessPoolExecutor]:
    # Processes are spawned: a fork of a process in which JAX runs threads may hang.
    context = multiprocessing.get_context("spawn")
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(job, tokenizer))
    try:
        yield pool
    except BrokenProcessPool:
        _kill_all_except(others)
        raise UserError(
            "a process that packs the corpus ended early: it was killed (is memory short?), or the script that calls "
            'lsjax does not do so under `if __name__ == "__main__":`; the same command goes on where it was'
        ) from None
    except _InterruptedError:
        _kill_all_except(others)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _kill_all_except(others: Sequence[BaseProcess]) -> None:
    """Kills the processes of a pool: those that began after `others`, however far each has started."""
    for process in multiprocessing.active_children():
        if process not in others:
            process.kill()


class _InterruptedError(Exception):
    """Ends a pool at once."""


@contextlib.contextmanager
def _signals_held() -> Iterator[list[int]]:
    """Gives a list to which SIGINT and SIGTERM add themselves. At the end, the first one of them is raised.

    Python drops what a handler raises while a callback of the garbage collector happens to run, so no handler raises.
    """
    held: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main one only
        yield held
        return
    before = {number: signal.signal(number, lambda number, _: held.append(number)) for number in _SIGNALS}
    try:
        yield held
    except _InterruptedError:
        pass  # raised below as what the signal stands for
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if held:
        raise KeyboardInterrupt if held[0] == signal.SIGINT else SystemExit(128 + held[0])


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Blocks SIGINT and SIGTERM. Processes that are started meanwhile begin so, and print no traceback of their own."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_state: tuple[Job, Tokenizer]


def _start(job: Job, tokenizer: Path) -> None:
    """Prepares a new process: it uses one core, and ends with the process that started it.

    A terminal or a cluster may send a signal to every process. The parent alone acts on it.
    """
    global _state
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _state = (job, open_tokenizer(tokenizer, job.vocab_size))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _pack(block: Block) -> Part:
    job, tokenizer = _state
    return pack_block(block, job, tokenizer)
