"""Files written so that nobody ever sees half of one, and read with errors that name them.

A path is one on a disk, or a `BucketPath` (lsjax/buckets.py), which has the same methods for reading. What differs
between the two is in this module: paths are made with `as_path`, and files are written with its functions.
"""

import contextlib
import glob
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from lsjax.errors import UserError, shown

if TYPE_CHECKING:
    from lsjax.buckets import BucketPath

_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_COLLAPSED = re.compile(r"^(gs:|s3:)/(?!/)")  # what pathlib.Path makes of a URL
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}")  # what `write_atomically` calls a file that is not complete


def shipped_folder(name: str) -> Path:
    """Returns a folder that ships: inside the package of a wheel, beside the package in a checkout."""
    package = Path(__file__).parent
    return package / name if (package / name).is_dir() else package.parent / name


_unfinished: set[Path] = set()


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[None]:
    """Marks a file or folder that is not complete within the context, for a process that must end there at once."""
    _unfinished.add(path)
    try:
        yield
    finally:
        _unfinished.discard(path)


def remove_unfinished() -> None:
    """Removes the files and folders that are not complete."""
    for path in list(_unfinished):
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def in_bucket(path: Any) -> "TypeGuard[BucketPath]":
    """Returns whether a path is one in an object store."""
    return not isinstance(path, str | Path)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that it is there whole, or as before. Raises UserError when it cannot.

    On a disk it writes a file beside `path`, flushes it, then renames it to `path`. A bucket does so by itself.
    """
    path = path_of(path)
    data = content.encode() if isinstance(content, str) else content
    if in_bucket(path):
        try:
            path.write_bytes(data)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with unfinished(temporary):
        try:
            with temporary.open("xb") as file:  # unlike a file of the tempfile module, this one has the umask's mode
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None
        finally:
            with contextlib.suppress(OSError):  # it is not there, or its folder is none
                temporary.unlink()


@contextlib.contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Gives an empty folder beside `target`, to be filled and renamed to it. What is there at the end is removed.

    Where `target` is in a bucket, the folder is a temporary one, to be uploaded.

    The scratch folders of processes that were killed are removed first. A folder in use is locked.
    """
    target = Path(tempfile.gettempdir()) / target.name if in_bucket(target) else path_of(target).absolute()
    for left in target.parent.glob(f".{glob.escape(target.name)}.*"):
        if _TEMPORARY.fullmatch(left.name) and left.is_dir():
            with _locked_folder(left) as is_ours:
                if is_ours:
                    shutil.rmtree(left, ignore_errors=True)
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    scratch.mkdir()
    with unfinished(scratch), _locked_folder(scratch):
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _locked_folder(path: Path) -> Iterator[bool]:
    """Locks a folder until the end of the context or of the process; gives whether no other process has locked it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        yield _lock(handle)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (ImportError, OSError):  # Windows; in use, or on a file system without locks
        return False


def obey_umask(path: Path) -> None:
    """Gives a file the mode that the umask asks for. Libraries that write through a private file leave it at 0600."""
    probe = Path(path).with_name(f".{secrets.token_hex(8)}")
    probe.touch(exist_ok=False)
    try:
        shutil.copymode(probe, path)
    finally:
        probe.unlink()


def remove_interrupted_writes(folder: Path) -> None:
    """Removes what `write_atomically` left in a folder when its process was killed. Nobody else may write there.

    In a bucket it leaves nothing.
    """
    for path in () if in_bucket(folder) else folder.iterdir():
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def check_writable(path: Path, what: str) -> None:
    """Raises UserError when no file can be written at `path`. what: its name in the message."""
    path = path_of(path)
    folder = path.absolute().parent
    if not in_bucket(folder) and not folder.is_dir():
        raise UserError(f"cannot write {what} {path}: its folder does not exist")
    if path.is_dir():
        raise UserError(f"cannot write {what} {path}: it is a folder")
    make_folder(folder, f"{what} in")


def check_replaceable(path: Path, what: str, is_ours: Callable[[bytes], bool]) -> None:
    """Raises UserError when no file can be written at `path`, or when there is one that is not to be replaced.

    what: its name in the message. is_ours: whether a file of this content is an earlier result, which may go.
    """
    check_writable(path, what)
    if path.absolute().parent.parts[:2] in (("/", "proc"), ("/", "dev")) and path.parent.name != "shm":
        raise UserError(f"cannot write {what} {path}: that folder holds devices and processes, not files")
    if not path.exists():
        return
    if not path.is_file():
        raise UserError(f"cannot write {what} {path}: it is a pipe or a device")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot write {what} {path}: {error.strerror}") from None
    if content.strip() and not is_ours(content):
        raise UserError(f"{what} {path} holds something else already: give a new file, or move it away")


def check_report(path: str | None, key: str) -> None:
    """Raises UserError when --report cannot be written, or is a file that is no earlier report: one without `key`."""

    def is_report(content: bytes) -> bool:
        try:
            tree = json.loads(content)
        except (ValueError, RecursionError):
            return False
        return isinstance(tree, dict) and key in tree

    if path:
        check_replaceable(path_of(path), "--report", is_report)


@contextlib.contextmanager
def own_results(path: Path) -> Iterator[None]:
    """Turns errors about the content of a file of results, which a command wrote itself, into a UserError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); remove it to measure again") from None


def path_text(path: Any, name: str) -> str | bytes:
    """Returns the text of a path. Raises UserError, with `name` in it, for what is no path."""
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"{name} must be a text or a Path, got {type(path).__name__}")
    try:
        return os.fspath(path)
    except Exception as error:  # of a class of the caller's own
        raise UserError(f"{name} cannot be read: {shown(error)}") from error


def as_path(path: Any, name: str = "path") -> Path:
    """Returns a path that a person gave: a `BucketPath` for gs:// and s3://, else with a leading ~ expanded.

    A BucketPath is no Path, but has the methods that lsjax uses; the type is given as Path to the code that uses both.

    name: the argument's, for the message. Raises UserError for what is no path, for an empty one, which would be the
    current folder, for names that file systems, or the libraries that write checkpoints, do not take, and for a URL
    that nothing here can read.
    """
    text = path_text(path, name)
    if not text.strip():
        raise UserError(f"{name} is empty; name a file or folder")
    try:
        encoded = b"\0" if isinstance(text, bytes) else text.encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8 arrive as halves of surrogate pairs
        encoded = b"\0"
    if b"\0" in encoded:
        raise UserError(f"{name} must be a path in UTF-8, got {shown(text)}")
    if len(encoded) > _LONGEST_PATH or max(map(len, encoded.split(b"/"))) > _LONGEST_NAME:
        raise UserError(
            f"{name} is longer than a path may be, or has a name of over {_LONGEST_NAME} bytes: {shown(text)}"
        )
    text = _COLLAPSED.sub(r"\1//", os.fsdecode(text))
    if _URL.match(text):
        from lsjax.buckets import bucket_path  # not imported where no bucket is used

        return bucket_path(text, name)
    return Path(os.path.expanduser(text))


def disk_path(path: Any, name: str) -> Path:
    """Returns a path as `as_path` does, for what only a disk can hold. Raises UserError for one in a bucket."""
    found = as_path(path, name)
    if in_bucket(found):
        raise UserError(f"{name} {found} is in a bucket; it must be on a disk")
    return found


def path_of(text: str | Path, name: str = "path") -> Path:
    """Returns the path of a text as it is: checked before, or to be checked by what opens it.

    name: as in `as_path`.
    """
    if isinstance(text, str) and _URL.match(text):
        return as_path(text, name)
    return Path(text) if isinstance(text, str) else text


def make_folder(path: Path, what: str) -> Path:
    """Creates and returns the folder `path`. Raises UserError, with `what` in it, when nothing can be written there."""
    path = path_of(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        _write_probe(path)
    except OSError as error:
        raise UserError(f"cannot write {what} {path}: {error.strerror or error}") from None
    return path


def check_folder(path: Path, what: str) -> None:
    """Raises UserError, with `what` in it, when nothing can be written in `path`, or when it cannot be created."""
    path = path_of(path).absolute()
    try:
        _write_probe(path if in_bucket(path) else next(p for p in (path, *path.parents) if p.exists()))
    except OSError as error:
        raise UserError(f"cannot write {what} {path}: {error.strerror or error}") from None


def _write_probe(folder: Path) -> None:
    """Writes a file and removes it. Raises OSError when the folder does not take one."""
    if in_bucket(folder):
        probe = folder / f".probe.{secrets.token_hex(4)}"
        probe.write_bytes(b"")
        probe.unlink()
        return
    with tempfile.TemporaryFile(dir=folder):
        pass


def remove(path: Path) -> None:
    """Removes a file, or a folder with all that is in it; nothing if it is not there."""
    if in_bucket(path):
        path.rmtree(missing_ok=True)
    elif path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


def upload_folder(source: Path, target: "BucketPath", last: Collection[str] = ()) -> None:
    """Uploads the files of a folder on disk. last: names of those that make the folder complete, uploaded at the end.

    Raises OSError.
    """
    files = sorted((path for path in source.rglob("*") if path.is_file()), key=lambda path: (path.name in last, path))
    for path in files:
        target.joinpath(*path.relative_to(source).parts).upload(path)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file. Raises UserError that names the file."""
    try:
        path = path_of(path)
        check_not_pointer(path)
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deep
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a JSON object")
    return tree


def check_not_pointer(path: Path) -> None:
    """Raises UserError when a file is a Git LFS pointer, which a clone without Git LFS has in place of the content.

    And when it is a pipe or a device, whose reading might never end.
    """
    path = path_of(path)
    if not in_bucket(path) and not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{path} is a pipe or a device, not a file")
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs.github.com/spec/"):
            raise UserError(f"{path} is a Git LFS pointer, not the file itself; fetch it with: git lfs pull")
