"""Writing files so that a reader, or a crash, never sees half of one; reading them with errors that name them."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from lsjax.errors import UserError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes beside `path`, flushes to disk, then renames over it."""
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_writable(path: Path, what: str) -> None:
    """Raises UserError, before any work is done, when a file cannot be written at `path`."""
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise UserError(f"cannot write {what} {path}: its folder does not exist")
    if Path(path).is_dir():
        raise UserError(f"cannot write {what} {path}: it is a folder")
    make_folder(folder, f"{what} in")


def make_folder(path: Path, what: str) -> Path:
    """Creates `path` and proves that it can be written; raises UserError naming it otherwise."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"cannot write {what} {path}: {error.strerror or error}") from None
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError that names the file."""
    try:
        tree = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # not UTF-8, or not JSON
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a JSON object")
    return tree
