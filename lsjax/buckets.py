"""Paths in object stores, gs://BUCKET/KEY and s3://BUCKET/KEY, through fsspec (the extras `gcs` and `s3`).

A bucket differs from a disk in three ways. An object appears whole when its upload ends, and replaces the one before at
once. Nothing can be appended to it. Folders are only the beginnings of names: every folder "exists" for writing, and
one without objects is not there for reading.
"""

import contextlib
import datetime
import errno
import glob
import importlib.util
import io
import logging
import types
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import fsspec.config
from etils.epath.backend import fsspec_backend

from lsjax.errors import UserError, shown

# pathlib.Path is for disks, so this is a subclass of its pure part. The type checker takes it for a whole one, because
# it has the methods that code for both uses.
if TYPE_CHECKING:
    _Base = Path
else:
    from etils.epath.gpath import PosixGPath as _Base

_PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # by scheme: the package to import, the extra that brings it
_NO_CREDENTIALS = {
    "gs": "no credentials: run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
}
_READ_AHEAD = 4 << 20  # bytes

# Other processes write to the same bucket, and a cached listing would hide what they wrote. A person may set other
# options of fsspec in files and variables that its documentation names.
for _protocol in ("gcs", "gs", "s3"):
    fsspec.config.conf.setdefault(_protocol, {}).setdefault("use_listings_cache", False)

# gcsfs logs what it also raises, with tracebacks. GCSFS_DEBUG sets another level.
if logging.getLogger("gcsfs").level == logging.NOTSET:
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def bucket_path(url: str, name: str) -> "BucketPath":
    """Returns the path of a URL. Raises UserError, with `name` in it, when no package here can read it."""
    scheme, _, rest = url.partition("://")
    if scheme not in _PACKAGES or not rest.strip("/") or {".", ".."} & set(rest.split("/")):
        raise UserError(f"{name} must be a path on a disk, gs://BUCKET/PATH or s3://BUCKET/PATH, got {shown(url)}")
    package, extra = _PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{name} {url} needs {package}: pip install 'lsjax[{extra}]'")
    return BucketPath(url)


class Object(NamedTuple):
    """An object in a listing. size: in bytes. version: differs whenever the content does."""

    size: int
    version: str


class BucketPath(_Base):
    """A path in a bucket, with the part of pathlib.Path that lsjax uses. Every failure is an OSError with a reason.

    Orbax gets the URL, and makes a path of its own from it, which also opens objects for writing.
    """

    @property
    def scheme(self) -> str:
        """The kind of store: "gs" or "s3"."""
        return str(self).partition("://")[0]

    @property
    def bucket(self) -> str:
        """The name of the bucket."""
        return str(self).partition("://")[2].partition("/")[0]

    @property
    def store(self) -> Any:
        """The file system of fsspec that holds this path, the one that Orbax uses too."""
        with self._os_errors():
            return fsspec_backend.fs(str(self))

    def exists(self) -> bool:
        return self._kind() != ""

    def is_dir(self) -> bool:
        return self._kind() == "directory"

    def is_file(self) -> bool:
        return self._kind() == "file"

    def is_symlink(self) -> bool:
        return False

    def _kind(self) -> str:
        try:
            return self._info()["type"]
        except FileNotFoundError:
            return ""

    def _info(self) -> dict[str, Any]:
        with self._os_errors():
            return self.store.info(str(self))

    def stat(self) -> Any:
        """Returns the size in bytes, `st_size`, and the time of the last change by the store's clock, `st_mtime`."""
        info = self._info()
        with self._os_errors():
            changed = self.store.modified(str(self)) if info["type"] == "file" else datetime.datetime.min
        return types.SimpleNamespace(st_size=info["size"], st_mtime=changed.timestamp())

    def iterdir(self) -> Iterator["BucketPath"]:
        """Yields the objects and folders directly in this folder; none where there are none."""
        try:
            with self._os_errors():
                names = self.store.ls(str(self), detail=False)
        except FileNotFoundError:
            return
        for name in sorted({PurePosixPath(name).name for name in names}):
            if name != self.name:  # an object that stands for the folder itself
                yield self / name

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """Yields the objects and folders that match, in the order of their names."""
        for name in self._matching(pattern):
            yield BucketPath(f"{self.scheme}://{name}")

    def objects(self, pattern: str) -> dict[str, "Object"]:
        """Returns each object that matches, by its path inside this folder, from one listing."""
        root = f"{str(self).partition('://')[2]}/"
        found = {name.removeprefix(root): info for name, info in self._matching(pattern).items()}
        return {
            name: Object(info["size"], str(info.get("generation") or info.get("ETag")))
            for name, info in found.items()
            if info["type"] == "file"
        }

    def _matching(self, pattern: str) -> dict[str, Any]:
        with self._os_errors():
            return self.store.glob(f"{glob.escape(str(self))}/{pattern}", detail=True)

    def open(self, mode: str = "r", encoding: str | None = None, newline: str | None = None) -> Any:
        """Opens the object for reading. What is written is written whole, by `write_bytes`."""
        if mode not in ("r", "rb"):
            raise io.UnsupportedOperation(f"an object cannot be opened with mode {mode!r}")
        with self._os_errors():
            file = io.BufferedReader(_Reader(self), _READ_AHEAD)
        return file if mode == "rb" else io.TextIOWrapper(file, encoding=encoding or "utf-8", newline=newline)

    def read_bytes(self) -> bytes:
        with self._os_errors():
            return self.store.cat_file(str(self))

    def read_text(self, encoding: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8")

    def write_bytes(self, data: bytes, *, new: bool = False) -> int:
        """Writes the object. new: raises FileExistsError, decided by the store, when there is one already."""
        with self._os_errors():
            self.store.pipe_file(str(self), data, mode="create" if new else "overwrite")
        return len(data)

    def upload(self, file: Path) -> None:
        """Writes the content of a file on this machine's disk."""
        with self._os_errors():
            self.store.put_file(str(file), str(self))

    def download(self, file: Path) -> None:
        """Reads the object into a file on this machine's disk."""
        with self._os_errors():
            self.store.get_file(str(self), str(file))

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: folders are only the beginnings of names."""

    def unlink(self, missing_ok: bool = False) -> None:
        self._remove(missing_ok, recursive=False)

    def rmtree(self, missing_ok: bool = False) -> None:
        self._remove(missing_ok, recursive=True)

    def _remove(self, missing_ok: bool, recursive: bool) -> None:
        try:
            with self._os_errors():
                self.store.rm(str(self), recursive=recursive)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def absolute(self) -> "BucketPath":
        return self

    def expanduser(self) -> "BucketPath":
        return self

    def resolve(self, strict: bool = False) -> "BucketPath":
        return self

    @contextlib.contextmanager
    def _os_errors(self) -> Iterator[None]:
        """Turns what the libraries of the stores raise into OSErrors that have a strerror."""
        try:
            yield
        except io.UnsupportedOperation:
            raise
        except Exception as error:
            raise _os_error(error, self) from error


class _Reader(io.RawIOBase):
    """The bytes of an object, fetched in ranges, with errors that are OSErrors."""

    def __init__(self, path: BucketPath):
        self._path, self._file = path, path.store.open(str(path), "rb", block_size=_READ_AHEAD)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with self._path._os_errors():
            return self._file.readinto(buffer)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


def _os_error(error: Exception, path: BucketPath) -> OSError:
    text = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, FileExistsError) or "PreconditionFailed" in text:
        return FileExistsError(errno.EEXIST, "the object exists", str(path))
    if isinstance(error, FileNotFoundError) or "NoSuchBucket" in text:
        return FileNotFoundError(errno.ENOENT, f"no such object, or no bucket {path.bucket}", str(path))
    if "Anonymous caller" in text or type(error).__name__ in ("NoCredentialsError", "DefaultCredentialsError"):
        return PermissionError(errno.EACCES, _NO_CREDENTIALS[path.scheme], str(path))
    if isinstance(error, PermissionError) or text.startswith("Forbidden"):
        return PermissionError(errno.EACCES, f"the bucket refuses it: {text}", str(path))
    return OSError(errno.EIO, text, str(path))
