"""Recorded models of transformers in tests/io/recorded: copies of them, and changes of a copy."""

import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.numpy import load_file, save_file

RECORDED = Path(__file__).parent.parent / "io" / "recorded"


def copy_of(variant: str, folder: Path) -> Path:
    """Copies a recorded model to a folder."""
    return Path(shutil.copytree(RECORDED / variant, folder))


def edit_tensors(folder: Path, edit: Callable[[dict], object]) -> None:
    """Rewrites the tensors of a folder after `edit(tensors)` has changed them."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
