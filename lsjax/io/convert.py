"""Converts a model to another format on disk."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsjax.config import ModelConfig
from lsjax.errors import UserError
from lsjax.files import as_path, disk_path, in_bucket, make_folder, scratch_folder, upload_folder
from lsjax.io.adapter import AdaptedSource
from lsjax.io.checkpoints import save_model
from lsjax.io.exit_adapter import write_exit_adapter
from lsjax.io.gguf_vocabulary import byte_level_vocabulary
from lsjax.io.gguf_writer import write_gguf
from lsjax.io.huggingface import write_huggingface
from lsjax.io.open import open_model
from lsjax.io.peft import CONFIG as ADAPTER_CONFIG
from lsjax.io.peft import write_peft
from lsjax.io.source import ModelSource, abstract_like
from lsjax.io.workdir import CONFIG, write_model_config
from lsjax.model.exit_adapter import ExitAdapter
from lsjax.model.transformer import Params, abstract_params

FORMATS = ("huggingface", "lsjax", "peft", "gguf")


class Converted(NamedTuple):
    """The model that was written: its config and its parameters, or in PEFT's layout those of the LoRA adapter.

    exit_adapter: the adapter of an exit that was written too; None when there is none, in PEFT's layout and in GGUF.
    """

    config: ModelConfig
    params: Params
    exit_adapter: ExitAdapter | None


def convert(
    source: str | Path, target: str | Path, form: str, dtype: str = "stored", adapter: str | Path | None = None
) -> Converted:
    """Writes the model at `source` to the new folder `target`, for "gguf" a new file, and returns what was written.

    source: anything that `load` takes.
    form: "huggingface" (transformers loads it, without the adapter of an exit) or "lsjax" (for `load` and
        config.initial_model) or "gguf" (for llama.cpp), with LoRA adapters merged; "peft" writes the adapter of a run
        with LoRA alone.
    dtype: the dtype of the written weights; "stored" keeps each one bit for bit. Merged weights are rounded to theirs.
    adapter: a LoRA adapter to change the model by, as in `load`.

    It appears whole or not at all; in a bucket, the config.json of a folder comes last and makes it complete. Raises
    UserError when `target` holds something already, when the source cannot be read, and for what GGUF has no place for.
    """
    target = as_path(target, "the target")
    if form not in FORMATS:
        raise UserError(f"unknown format {form!r}; choose one of {', '.join(FORMATS)}")
    if form == "gguf":
        return _convert_to_gguf(source, disk_path(target, "a GGUF file"), dtype, adapter)
    _check_new(target)
    model = open_model(source, adapter)
    params = _load_adapter(model, source, dtype) if form == "peft" else _load_params(model, dtype)
    exit_adapter = None if form == "peft" else _load_exit_adapter(model, dtype)
    with scratch_folder(target) as scratch:
        try:
            _write(model, params, scratch, form)
            if exit_adapter:
                write_exit_adapter(scratch, exit_adapter)
            if in_bucket(target):
                upload_folder(scratch, target, last=(CONFIG, ADAPTER_CONFIG))
            else:
                scratch.replace(target)
        except UserError:
            raise
        except Exception as error:  # safetensors and Orbax raise their own types when the disk is full
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise UserError(f"cannot write {target}: {reason}") from None
    return Converted(model.config, params, exit_adapter)


def _convert_to_gguf(source: str | Path, target: Path, dtype: str, adapter: str | Path | None) -> Converted:
    if target.exists():
        raise UserError(f"{target} exists; give a new file")
    make_folder(target.absolute().parent, "folder")
    model = open_model(source, adapter)
    if exit_adapter := model.load_exit_adapter():
        raise UserError(
            f"{source} has an adapter for the drafts of exit {exit_adapter.exit_layer}, which GGUF has no place for; "
            "convert the model that it was trained on, which has the same weights"
        )
    vocabulary = byte_level_vocabulary(model.tokenizer, model.config.vocab_size, str(source))
    params = _load_params(model, dtype)
    write_gguf(target, model.config, params, vocabulary)
    return Converted(model.config, params, None)


def _check_new(target: Path) -> None:
    """Raises UserError unless a folder can be made at `target`."""
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{target} exists and holds something; give a new folder")
    except OSError as error:
        raise UserError(f"cannot write folder {target}: {error.strerror}") from None
    make_folder(target if in_bucket(target) else target.absolute().parent, "folder")


def _load_params(source: ModelSource, dtype: str) -> Params:
    """Reads all parameters onto the first device, in one dtype or, for "stored", each in the dtype of its file."""
    abstract = abstract_params(source.config)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    dtypes = source.stored_dtypes() if dtype == "stored" else jnp.dtype(dtype)
    return source.load_params(abstract_like(abstract, dtypes, jax.tree.map(lambda _: here, abstract)))


def _load_exit_adapter(source: ModelSource, dtype: str) -> ExitAdapter | None:
    """Reads the adapter of an exit in a dtype; "stored" keeps that of its file."""
    adapter = source.load_exit_adapter()
    if adapter is None or dtype == "stored":
        return adapter
    return dataclasses.replace(adapter, kernel=adapter.kernel.astype(jnp.dtype(dtype)))


def _load_adapter(model: ModelSource, source: str | Path, dtype: str) -> Params:
    """Returns the adapter of a run with LoRA. Raises UserError when `source` is none."""
    if not (isinstance(model, AdaptedSource) and model.adapter.rank):
        raise UserError(f"{source} is no run with LoRA (config.training.lora_rank), whose adapter could be written")
    return jax.tree.map(lambda a: a if dtype == "stored" else a.astype(jnp.dtype(dtype)), model.adapter.factors)


def _write(model: ModelSource, params: Params, folder: Path, form: str) -> None:
    if form == "peft":
        assert isinstance(model, AdaptedSource)
        write_peft(folder, model.adapter._replace(factors=params), model.config)
    elif form == "huggingface":
        write_huggingface(folder, model.config, params, model.tokenizer)
    else:
        # The small files come first: on a full disk TensorStore's threads print more than the one line.
        model.tokenizer.save(folder)
        write_model_config(folder, model.config)
        save_model(folder, params)
