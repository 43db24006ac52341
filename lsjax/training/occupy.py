"""One process per workdir, and nothing left behind by a start that is refused."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from lsjax.errors import UserError
from lsjax.files import in_bucket, make_folder, remove, remove_interrupted_writes
from lsjax.io.workdir import CONFIG
from lsjax.training.lease import leased

_LOCK = ".lock"


@contextlib.contextmanager
def occupied(workdir: Path) -> Iterator[Callable[[], None]]:
    """Creates `workdir` and keeps every other process out of it until the end of the context.

    Gives a function that raises UserError if, in a bucket, another process may have taken the workdir over.

    Files that a killed process left half-written are removed.
    A start that raises UserError before the workdir has a config.json leaves it as it was. Raises UserError when the
    workdir cannot be written or another process occupies it.
    """
    missing = [] if in_bucket(workdir) else [f for f in (workdir, *workdir.parents) if not f.exists()]
    try:
        with _locked(workdir) as check:
            remove_interrupted_writes(workdir)
            before = set(workdir.iterdir())
            try:
                yield check
            except UserError:
                if not (workdir / CONFIG).exists():
                    for path in set(workdir.iterdir()) - before:
                        remove(path)
                raise
    except BaseException:
        with contextlib.suppress(OSError):  # not empty, or gone
            for folder in missing:
                folder.rmdir()
        raise


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[Callable[[], None]]:
    if in_bucket(workdir):
        make_folder(workdir, "workdir")
        with leased(workdir) as lease:
            yield lease.check
    else:
        with _file_locked(workdir):
            yield lambda: None


@contextlib.contextmanager
def _file_locked(workdir: Path) -> Iterator[None]:
    """Holds an flock on a file in `workdir`, which the system releases when this process ends in whatever way."""
    path = workdir / _LOCK
    while True:
        make_folder(workdir, "workdir")
        try:
            file = path.open("a+")
        except FileNotFoundError:  # another start was refused and removed the folder
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise UserError(f"{workdir} is in use by {owner}: wait for its end, or use another --workdir") from None
        except OSError:  # a file system without locks
            pass
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # its former owner removed the file between our two calls
    with contextlib.suppress(OSError):  # a full disk: the lock holds without the name of its owner
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
