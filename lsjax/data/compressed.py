"""Opens files that may be compressed, by their names: .gz and .zst."""

import gzip
import io
import sys
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from lsjax.errors import UserError
from lsjax.files import in_bucket

SUFFIXES = (".gz", ".zst")
_BUFFER = 1 << 20  # bytes
READ_ERRORS: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)  # the latter two for a damaged .gz


def plain_name(name: str) -> str:
    """Returns a file name without the suffix of its compression."""
    return name.rsplit(".", 1)[0] if is_compressed(name) else name


def is_compressed(name: str) -> bool:
    """Returns whether a file is compressed, by its name."""
    return name.lower().endswith(SUFFIXES)


def open_bytes(path: Path, raw: BinaryIO | None = None) -> BinaryIO:
    """Opens a file for reading its content, decompressed.

    raw: the same file, already open as it is on disk, to be read through; the caller closes it.

    Reading raises one of READ_ERRORS where the file is damaged. Raises UserError for a .zst file where the package
    that reads it is not installed.
    """
    if in_bucket(path) and raw is None:
        raw = path.open("rb")  # it holds nothing that has to be closed
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(gzip.GzipFile(path, "rb", fileobj=raw), _BUFFER)  # pyright: ignore[reportArgumentType]
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_Zstandard(path, raw), _BUFFER)
    return raw or open(path, "rb")


def unreadable(path: Path, error: Exception) -> UserError:
    """Returns the error to raise for a file that raised one of READ_ERRORS."""
    return UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}")


class _Zstandard(io.RawIOBase):
    """The decompressed bytes of a .zst file. Damage raises OSError, as it does for other files."""

    def __init__(self, path: Path, raw: BinaryIO | None):
        try:
            if sys.version_info >= (3, 14):
                from compression import zstd
            else:
                from backports import zstd
        except ImportError:
            raise UserError(f'{path} needs a package to be decompressed: pip install "lsjax[zstd]"') from None
        self._file, self._damage = zstd.ZstdFile(raw or path, "rb"), zstd.ZstdError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return self._file.readinto(buffer)
        except self._damage as error:
            raise OSError(f"it is damaged: {error}") from None

    def close(self) -> None:
        self._file.close()
        super().close()
