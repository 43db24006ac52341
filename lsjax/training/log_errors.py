"""Errors of writing a run's logs."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lsjax.errors import UserError


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turns the errors of the file system into a UserError that names the log."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; move it away or free the disk") from None
