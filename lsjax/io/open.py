"""Opens a model: a training workdir, a Hugging Face folder, a GGUF file, a model that ships, or one of the Hub by name.

Opening checks everything that can be checked without reading parameters; the returned `ModelSource` reads those.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from lsjax.config import ModelConfig
from lsjax.data.tokenizer import Tokenizer
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.errors import UserError, shown
from lsjax.files import as_path, check_not_pointer, in_bucket, read_json
from lsjax.io import checkpoints
from lsjax.io import workdir as workdirs
from lsjax.io.adapter import AdaptedSource, read_run_adapter
from lsjax.io.base_model import check_base, describe_base, read_base
from lsjax.io.checkpoints import latest_step, load_kernel, load_params, load_part
from lsjax.io.exit_adapter import adapter_path, checked_adapter, read_exit_adapter
from lsjax.io.gguf import is_gguf, open_gguf, read_gguf_config
from lsjax.io.gguf_file import part_names
from lsjax.io.hub import fetch_model, parse_hub_name
from lsjax.io.huggingface import is_huggingface_config, open_huggingface, read_huggingface_config
from lsjax.io.peft import is_peft, read_peft
from lsjax.io.shipped import shipped_model, shipped_models
from lsjax.io.source import ModelSource
from lsjax.io.tensors import all_finite, check_finite, not_finite
from lsjax.model.exit_adapter import ExitAdapter
from lsjax.model.transformer import Params
from lsjax.scratch import local_copy

_COPIED = ("*.json", "*.jinja", "*.safetensors")  # of a Hugging Face folder in a bucket


@dataclasses.dataclass(frozen=True)
class WorkdirSource:
    """The model in the latest checkpoint of a training workdir."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer
    step: int

    def load_params(self, abstract: Params) -> Params:
        return self._checked(load_params(self.path, abstract)[1])

    def load_rest(self, abstract: Params) -> Params:
        return self._checked(load_part(self.path, self.step, abstract))

    def load_layers(self, name: str, abstract: jax.ShapeDtypeStruct) -> Iterator[jax.Array]:
        # A checkpoint stores all layers of a parameter as one array, so the whole array is read to the host.
        stacked = np.broadcast_to(np.zeros((), abstract.dtype), (self.config.num_layers, *abstract.shape))
        tree = functools.reduce(lambda tree, key: {key: tree}, reversed(name.split("/")), stacked)
        (stacked,) = jax.tree.leaves(load_part(self.path, self.step, tree))
        for layer in stacked:
            if not all_finite(layer):
                raise UserError(f"{self.path}: {not_finite(name)}")
            yield jax.device_put(layer, abstract.sharding)

    def load_exit_adapter(self) -> ExitAdapter | None:
        if not workdirs.is_run(self.path):
            return read_exit_adapter(adapter_path(self.path), self.config)
        exit_layer = workdirs.adapted_exit(self.path)
        if not exit_layer:
            return None
        kernel = load_kernel(self.path, self.step, self.config.width)
        return checked_adapter(ExitAdapter(exit_layer, kernel), self.config, str(self.path))

    def _checked(self, params: Params) -> Params:
        try:
            check_finite(params)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        return params

    def stored_dtypes(self) -> Params:
        return checkpoints.stored_dtypes(self.path)


def open_model(path: str | Path, adapter: str | Path | None = None) -> ModelSource:
    """Opens the model at a path and checks its files. Of parameters it reads those of adapters, and to hash a base.

    path: a path, the name of a model that ships, or a Hub name, whose files are fetched first. A path that exists
        takes precedence.
    adapter: a LoRA adapter to change the model by: a folder in PEFT's layout, or the workdir of a run with LoRA.

    Raises UserError that names the first file that is missing, damaged, or not a plain Llama, and when the model is not
    the one that the adapter was trained for, if that is known.
    """
    local = _local(path)
    kind = _kind(local)
    local = _on_disk(local, kind)
    if kind == "workdir" and workdirs.holds_adapter(local):
        if adapter is not None:
            raise UserError(f"{path} is a run with LoRA: give its base model ({read_base(local).path}) and one adapter")
        return _open_adapted(local)
    source = _open_plain(local, kind)
    return source if adapter is None else _with_adapter(path, source, as_path(adapter, "adapter"))


def _open_plain(path: Path, kind: str) -> ModelSource:
    if kind == "gguf":
        return open_gguf(path)
    if kind == "huggingface":
        return open_huggingface(path)
    config, tokenizer = workdirs.read_model_config(path), load_tokenizer(path)
    tokenizer.restrict_to(config.vocab_size, str(path))
    return WorkdirSource(path, config, tokenizer, latest_step(path))


def _open_adapted(workdir: Path) -> AdaptedSource:
    """Opens a run with LoRA: its adapter, and the base model that base_model.json names."""
    base = read_base(workdir)
    try:
        source = open_model(base.path)
    except UserError as error:
        raise UserError(
            f"{workdir} holds a LoRA adapter, and its base model cannot be opened ({error}); if it lies elsewhere, "
            f"give that path, and {workdir} as the adapter"
        ) from None
    return _with_adapter(base.path, source, workdir)


def _with_adapter(path: str | Path, source: ModelSource, folder: Path) -> AdaptedSource:
    """Returns the model `source`, opened from `path`, with the adapter in a folder."""
    if isinstance(source, AdaptedSource):
        raise UserError(f"{path} is a run with LoRA itself: merge it first, with lsjax convert")
    if is_peft(folder):
        adapter = read_peft(_on_disk(folder, "peft"), source.config)
    elif workdirs.is_run(folder) and workdirs.holds_adapter(folder):
        adapter = read_run_adapter(folder)
    else:
        raise UserError(f"no adapter at {folder}: it is neither a folder of PEFT nor the workdir of a run with LoRA")
    here = adapter.base and describe_base(path, source)
    if adapter.base and here:
        check_base(here, adapter.base, folder)
    config, tokenizer = source.config, source.tokenizer
    if adapter.step is not None:  # a run, which may have its own tokenizer and context length
        config, tokenizer = workdirs.read_model_config(folder), load_tokenizer(folder)
        tokenizer.restrict_to(config.vocab_size, str(folder))
    return AdaptedSource(source, adapter._replace(base=here), config, tokenizer, adapter.step)


def read_model_config(path: str | Path) -> ModelConfig:
    """Reads the config of the model at a path, for example for `config.model` of a run that starts from it.

    path: as in `open_model`; of a Hub name, config.json alone is fetched.
    """
    path = _local(path, with_weights=False)
    kind = _kind(path)
    path = _on_disk(path, kind, with_weights=False)
    readers = {
        "gguf": read_gguf_config,
        "huggingface": read_huggingface_config,
        "workdir": workdirs.read_model_config,
    }
    return readers[kind](path)


def _local(path: str | Path, with_weights: bool = True) -> Path:
    """Returns the path of a model on this machine; fetches what a Hub name stands for."""
    try:
        local = as_path(path, "path")
    except UserError as error:
        raise UserError(f"no model at {shown(path)}: {error}") from None
    name = parse_hub_name(path)
    return fetch_model(name, with_weights) if name else shipped_model(path) or local


def _on_disk(path: Path, kind: str, with_weights: bool = True) -> Path:
    """Returns the path of a model in files that are mapped into memory, after copying them if they are in a bucket.

    A workdir stays where it is: TensorStore reads it there.
    """
    if not in_bucket(path) or kind == "workdir":
        return path
    if kind == "gguf":
        return local_copy(path.parent, part_names(path.name)) / path.name  # pyright: ignore[reportArgumentType]
    patterns = _COPIED if with_weights else (workdirs.CONFIG,)
    try:
        names = [name for pattern in patterns for name in path.objects(pattern)]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return local_copy(path, names)


def _kind(path: Path) -> str:
    """Returns "gguf", "huggingface" or "workdir"."""
    try:
        exists, is_file, is_folder = path.exists(), path.is_file(), path.is_dir()
    except OSError as error:  # such as a name of more than 255 bytes
        raise UserError(f"no model at {path}: {error.strerror}") from None
    if not exists:
        ship = f" (those that ship: {', '.join(shipped_models())})" if len(path.parts) == 1 else ""
        raise UserError(f"no model at {path}: it does not exist{ship}")
    if is_file:
        if not is_gguf(path):
            check_not_pointer(path)
            raise UserError(f"{path} is a file, but not GGUF; give a GGUF file, a Hugging Face folder or a workdir")
        return "gguf"
    if not is_folder:
        raise UserError(f"no model at {path}: it is a pipe or a device, not a file or a folder")
    config = path / workdirs.CONFIG
    if not config.is_file():
        adapter = " but an adapter of PEFT: give its base model, and this folder as the adapter"
        found = adapter if (path / "adapter_config.json").is_file() else ""
        raise UserError(f"no model at {path}: it has no {workdirs.CONFIG}{found}")
    return "huggingface" if is_huggingface_config(read_json(config)) else "workdir"
