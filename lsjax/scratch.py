"""Copies of files in a bucket on this machine's disk, for libraries that read files only, as ArrayRecord does.

They lie in the folder lsjax-UID of the temporary folder (TMPDIR), and stay there for the next process on this machine.
"""

import fcntl
import hashlib
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING

from lsjax.errors import UserError
from lsjax.files import in_bucket

if TYPE_CHECKING:
    from lsjax.buckets import BucketPath

_AT_ONCE = 8  # downloads
_SECONDS = 10.0  # between two lines of progress


def say(text: str) -> None:
    """Prints a line about a copy that takes long."""
    print(text, file=sys.stderr, flush=True)


def on_disk(path: Path) -> Path:
    """Returns the path of a file on disk: `path` itself, or that of a copy."""
    return local_copy(path.parent, [path.name]) / path.name if in_bucket(path) else path  # pyright: ignore


def local_copy(folder: "BucketPath", names: Collection[str], note: Callable[[str], None] = say) -> Path:
    """Returns a folder on disk with those files of a folder in a bucket, after copying what is not there yet.

    note: receives lines about a copy that takes long. Each file appears whole or not at all, under a folder that is
    named after the versions of all, so a changed object is copied anew. Raises UserError when the disk is too small.
    """
    try:
        found = folder.objects("*")
        missing = [name for name in names if name not in found]
        if missing:
            raise UserError(f"{folder / missing[0]} is missing")
        versions = sorted((name, found[name].version) for name in names)
        target = _own_folder() / hashlib.sha256(repr((str(folder), versions)).encode()).hexdigest()[:24]
        target.mkdir(exist_ok=True)
        with (target / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process of this machine may be copying the same
            wanted = {name: found[name].size for name in names if not (target / name).exists()}
            _copy(folder, target, wanted, note)
    except OSError as error:
        raise UserError(f"cannot copy {folder} to this machine's disk: {error.strerror or error}") from None
    return target


def _own_folder() -> Path:
    """Returns the folder of all copies, which belongs to this user alone."""
    folder = Path(tempfile.gettempdir()) / f"lsjax-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user: set TMPDIR to another folder")
    return folder


def _copy(folder: "BucketPath", target: Path, sizes: Mapping[str, int], note: Callable[[str], None]) -> None:
    total, free = sum(sizes.values()), shutil.disk_usage(target).free
    if total > free:
        raise UserError(
            f"a copy of {folder} takes {total:,} bytes, and the disk of {target} has {free:,} left: set TMPDIR to a "
            "folder on a larger disk"
        )
    began = said = time.monotonic()
    done = 0
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        copies = {pool.submit(_download, folder / name, target / name, size): size for name, size in sizes.items()}
        try:
            for copy in as_completed(copies):
                copy.result()
                done += copies[copy]
                if time.monotonic() - said >= _SECONDS:
                    said = time.monotonic()
                    speed = done / 1e6 / (said - began)
                    note(
                        f"copied {done / 1e6:,.0f} of {total / 1e6:,.0f} MB of {folder} to {target}, {speed:,.0f} MB/s"
                    )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _download(source: "BucketPath", target: Path, size: int) -> None:
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        source.download(temporary)
        if temporary.stat().st_size != size:
            raise UserError(f"{source} changed while it was copied: start the same command again")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
