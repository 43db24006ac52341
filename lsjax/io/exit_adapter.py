"""The file of an exit adapter, exit_adapter.safetensors beside a model's weights. Other programs do not read it."""

import json
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lsjax.config import ModelConfig
from lsjax.errors import UserError, shown
from lsjax.files import check_not_pointer, obey_umask
from lsjax.io.tensors import all_finite, not_finite
from lsjax.model.exit_adapter import ExitAdapter
from lsjax.scratch import on_disk

FILE = "exit_adapter.safetensors"
_KERNEL, _EXIT_LAYER = "kernel", "exit_layer"


def adapter_path(model_path: Path) -> Path:
    """Returns where the adapter of the model at a path lies: in its folder, or beside its GGUF file, named after it."""
    return model_path / FILE if model_path.is_dir() else model_path.with_name(f"{model_path.name}.{FILE}")


def write_exit_adapter(folder: Path, adapter: ExitAdapter) -> None:
    """Writes an adapter, as training has it, into a model's new folder."""
    kernel = np.asarray(jax.device_get(adapter.kernel))
    save_file({_KERNEL: kernel}, folder / FILE, metadata={_EXIT_LAYER: json.dumps(adapter.exit_layer)})
    obey_umask(folder / FILE)


def read_exit_adapter(path: Path, config: ModelConfig) -> ExitAdapter | None:
    """Reads the adapter in a file, as a numpy array; None when there is no file.

    Raises UserError when it is damaged, or cannot be one of a model of this shape.
    """
    if not path.is_file():
        return None
    try:
        check_not_pointer(path)
        with safe_open(on_disk(path), framework="numpy") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            kernel = file.get_tensor(_KERNEL) if names == [_KERNEL] else None
    except (SafetensorError, OSError, TypeError) as error:
        raise UserError(f"{path} is damaged, or no safetensors file: {error}") from None
    if kernel is None:
        raise UserError(f"{path} holds {shown(names)}; an exit adapter is one tensor, {_KERNEL}")
    exit_layer = metadata.get(_EXIT_LAYER, "")
    if not exit_layer.isdecimal() or not 1 <= int(exit_layer[:9]) < config.num_layers:
        raise UserError(
            f"{path} is of exit layer {shown(exit_layer)}; this model has early exits 1..{config.num_layers - 1}"
        )
    return checked_adapter(ExitAdapter(int(exit_layer), kernel), config, str(path))


def checked_adapter(adapter: ExitAdapter, config: ModelConfig, where: str) -> ExitAdapter:
    """Returns an adapter of numpy arrays. Raises UserError, with `where` in it, when its kernel cannot be used."""
    kernel = np.asarray(adapter.kernel)
    if kernel.shape != (config.width, config.width) or not jax.numpy.issubdtype(kernel.dtype, jax.numpy.floating):
        raise UserError(
            f"{where}: {_KERNEL} is {kernel.dtype} {list(kernel.shape)}; a model of width {config.width} needs numbers "
            f"[{config.width}, {config.width}]"
        )
    if not all_finite(kernel):
        raise UserError(f"{where}: {not_finite(_KERNEL)}")
    return adapter
