"""Reads and writes LoRA adapters in the layout of PEFT: adapter_config.json and adapter_model.safetensors.

PEFT adapts each projection by itself. Ours share A where they share an input (q, k and v; gate and up), so a written
folder repeats that A. Reading stacks the factors of such projections into one of higher rank.
"""

import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors.numpy import save_file

from lsjax.checks import MAX_FLOAT
from lsjax.config import ModelConfig
from lsjax.errors import UserError, shown
from lsjax.files import obey_umask, path_of, read_json, write_atomically
from lsjax.io.adapter import Adapter
from lsjax.io.base_model import BASE_MODEL, read_base, write_base
from lsjax.io.huggingface import read_header
from lsjax.io.layout import Piece, parameter_pieces
from lsjax.io.tensors import StoredTensor, parameter_path
from lsjax.model.lora import MATRICES, Factors, factor_shapes, factors_of
from lsjax.model.transformer import abstract_params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Settings under which PEFT computes something else than W + scale A B, with the values that change nothing.
_UNSUPPORTED = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "alpha_pattern": ({}, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "megatron_config": (None, {}),
    "use_qalora": (False, None),
}


class _Module(NamedTuple):
    """A projection that PEFT adapts: the matrix that it is part of, its layer (0 outside layers), and the part."""

    path: str
    layer: int
    piece: Piece

    @property
    def sides(self) -> tuple[int, int]:
        """The numbers of inputs and outputs."""
        inputs = MATRICES[self.path]
        return math.prod(self.piece.size[:inputs]), math.prod(self.piece.size[inputs:])

    @property
    def outputs(self) -> tuple[slice, ...]:
        """The place of the outputs in B, after its axis r."""
        inputs = MATRICES[self.path]
        places = zip(self.piece.offset[inputs:], self.piece.size[inputs:], strict=True)
        return tuple(slice(start, start + size) for start, size in places)


class _Part(NamedTuple):
    """A projection with its factors in float32: A [r, inputs] and B [outputs, r]."""

    module: _Module
    a: np.ndarray
    b: np.ndarray


def is_peft(folder: Path) -> bool:
    """Returns whether a folder holds an adapter in PEFT's layout."""
    return (path_of(folder) / CONFIG).is_file()


def write_peft(folder: Path, adapter: Adapter, config: ModelConfig) -> None:
    """Writes the adapter of a run, in files that PEFT reads, and base_model.json.

    Raises UserError for an adapter of a tied embedding, which PEFT does not have.
    """
    assert adapter.base is not None
    if config.tie_embeddings and "embed" in adapter.factors:
        raise UserError(
            f"{adapter.where} adapts a tied embedding as table and head; PEFT adapts the table alone, so write the "
            "merged model: --format=huggingface"
        )
    tensors, targets = {}, set()
    for name, module in _modules(config).items():
        factors = factors_of(adapter.factors, module.path)
        if factors is not None:
            for key, factor in zip(_tensor_names(name), _cut(module, factors), strict=True):
                tensors[key] = factor
            targets.add(name.rpartition(".")[2])
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    obey_umask(folder / WEIGHTS)
    write_base(folder, adapter.base)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base.path,
        "r": adapter.rank,
        "lora_alpha": adapter.scale * adapter.rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
    }
    write_atomically(folder / CONFIG, json.dumps(settings, indent=2))


def read_peft(folder: Path, config: ModelConfig) -> Adapter:
    """Reads an adapter for a model of this shape.

    Raises UserError that names the first tensor or setting that is missing, damaged, or not plain LoRA of this model.
    """
    folder = Path(folder)
    settings, tensors, path = _read_settings(folder / CONFIG), _read_tensors(folder), folder / WEIGHTS
    modules = _modules(config)
    found = {
        name: _read_part(path, module, _tensor_names(name), tensors)
        for name, module in modules.items()
        if not tensors.keys().isdisjoint(_tensor_names(name))
    }
    copies = sorted(name for name in tensors if name.endswith(".base_layer.weight"))
    if copies:
        raise UserError(f"{path} holds {copies[0]}, a base weight: save it with PEFT's save_embedding_layers=False")
    if tensors:
        raise UserError(f"{path} is an adapter for another model: this one has no place for {min(tensors)}")
    _check_complete(path, settings, set(modules), set(found))
    if config.tie_embeddings and "model.embed_tokens" in found:
        raise UserError(f"{path} adapts the embedding without the head that is tied to it, which lsjax cannot merge")
    factors: dict[str, Any] = {}
    for keys, matrix in jax.tree_util.tree_leaves_with_path(abstract_params(config)):
        *parents, last = (key.key for key in keys)
        parts = [part for part in found.values() if part.module.path == parameter_path(keys)]
        if parts:
            place = functools.reduce(lambda tree, key: tree.setdefault(key, {}), parents, factors)
            place[last] = _stack(parts, matrix.shape, settings)
    base = read_base(folder) if (folder / BASE_MODEL).is_file() else None
    return Adapter(folder, factors, 1.0, base=base)


def _modules(config: ModelConfig) -> dict[str, _Module]:
    """Returns every projection by its name in transformers, such as model.layers.0.self_attn.q_proj."""
    modules = {}
    for path, pieces in parameter_pieces(config).items():
        for piece in pieces if path in MATRICES else ():
            for layer in range(config.num_layers) if "{layer}" in piece.tensor else (0,):
                name = piece.tensor.format(layer=layer).removesuffix(".weight")
                modules[name] = _Module(path, layer, piece)
    return modules


def _tensor_names(module: str) -> tuple[str, str]:
    """Returns the names of A and B."""
    if module.endswith("embed_tokens"):
        return f"{_PREFIX}{module}.lora_embedding_A", f"{_PREFIX}{module}.lora_embedding_B"
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


def _cut(module: _Module, factors: Factors) -> tuple[np.ndarray, np.ndarray]:
    """Returns a projection's A [r, inputs] and B [outputs, r], cut from the factors of its matrix."""
    stacked = module.path.startswith("layers/")
    a, b = (np.asarray(factors[side][module.layer] if stacked else factors[side]) for side in ("lora_a", "lora_b"))
    rank = a.shape[-1]
    b = b[(slice(None), *module.outputs)]
    return np.ascontiguousarray(a.reshape(-1, rank).T), np.ascontiguousarray(b.reshape(rank, -1).T)


def _stack(parts: list[_Part], shape: tuple[int, ...], settings: dict[str, Any]) -> Factors:
    """Returns the factors of one matrix of this shape from its parts, with the scale in B.

    Each projection has its own range of the rank, in which B is zero for the outputs of the others.
    """
    path, inputs = parts[0].module.path, MATRICES[parts[0].module.path]
    pieces = list(dict.fromkeys(part.module.piece for part in parts))
    ranks = [max(len(part.a) for part in parts if part.module.piece == piece) for piece in pieces]
    starts = dict(zip(pieces, np.cumsum([0, *ranks]).tolist(), strict=False))
    a_all, b_all = (np.zeros(size, np.float32) for size in factor_shapes(path, shape, sum(ranks)))
    for module, a, b in parts:
        rank, start, size = len(a), starts[module.piece], module.piece.size
        scale = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)
        a_own, b_own = (a_all[module.layer], b_all[module.layer]) if path.startswith("layers/") else (a_all, b_all)
        a_own[..., start : start + rank] = a.T.reshape(*size[:inputs], rank)
        with np.errstate(over="ignore"):  # infinity is refused when the adapter is checked
            b_own[(slice(start, start + rank), *module.outputs)] = scale * b.T.reshape(rank, *size[inputs:])
    return {"lora_a": a_all, "lora_b": b_all}


def _read_settings(path: Path) -> dict[str, Any]:
    """Reads adapter_config.json. Raises UserError for everything that is not plain LoRA."""
    settings = read_json(path)
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {shown(settings.get('peft_type'))}; lsjax reads LORA only")
    for key, allowed in _UNSUPPORTED.items():
        if settings.get(key, allowed[0]) not in allowed:
            raise UserError(f"{path}: {key} is {shown(settings[key])}; lsjax supports only {allowed[0]!r}")
    alpha = settings.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not -MAX_FLOAT <= alpha <= MAX_FLOAT:
        raise UserError(f"{path}: lora_alpha must be a number, got {shown(alpha)}")
    if not isinstance(settings.get("use_rslora", False), bool | None):
        raise UserError(f"{path}: use_rslora must be true or false, got {shown(settings['use_rslora'])}")
    return settings


def _read_tensors(folder: Path) -> dict[str, StoredTensor]:
    if not (folder / WEIGHTS).is_file():
        pickle = folder / "adapter_model.bin"
        hint = f"; {pickle.name} is a pickle, which can run any code when opened" if pickle.is_file() else ""
        raise UserError(f"{folder} has no {WEIGHTS}{hint}")
    return read_header(folder / WEIGHTS)


def _read_part(path: Path, module: _Module, names: tuple[str, str], tensors: dict[str, StoredTensor]) -> _Part:
    """Takes A and B of a projection out of `tensors`, reads them as float32 and checks them."""
    inputs, outputs = module.sides
    for name in names:
        if name not in tensors:
            raise UserError(f"{path} lacks the tensor {name}")
    a, b = (tensors.pop(name) for name in names)
    rank = a.shape[0] if a.shape else 0
    for name, tensor, wanted in zip(names, (a, b), ((rank, inputs), (outputs, rank)), strict=True):
        if tensor.shape != wanted or not rank:
            raise UserError(
                f"{path} is an adapter for another model: {name} has the shape {list(tensor.shape)}, this model needs "
                f"{list(wanted)}"
            )
    whole = (slice(None), slice(None))
    return _Part(module, a.read(whole).astype(np.float32), b.read(whole).astype(np.float32))


def _check_complete(path: Path, settings: dict[str, Any], modules: set[str], found: set[str]) -> None:
    """Raises UserError when a projection that target_modules names in every layer has no tensors."""
    targets = settings.get("target_modules")
    if not found:
        raise UserError(f"{path} holds no LoRA of this model")
    if not isinstance(targets, list) or settings.get("layers_to_transform") is not None:
        return
    excluded = settings.get("exclude_modules")
    for name in sorted(modules - found):
        if excluded is None and any(name == target or name.endswith(f".{target}") for target in targets):
            raise UserError(f"{path} lacks the factors of {name}, which target_modules of {CONFIG} names")
