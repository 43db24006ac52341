"""The base of an adapter: which model it is, where it lies, and a hash by which it is recognised.

A run with LoRA and an exported adapter hold base_model.json and not the base itself. The hash covers the model's shape
and the values of its parameters, so a copy of the base in another format is the same base.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lsjax.errors import UserError
from lsjax.files import as_path, path_of, read_json, write_atomically
from lsjax.io.hub import parse_hub_name
from lsjax.io.shipped import shipped_model
from lsjax.io.source import ModelSource
from lsjax.io.tensors import parameter_path
from lsjax.model.transformer import abstract_params

BASE_MODEL = "base_model.json"


class BaseModel(NamedTuple):
    """A base model: its absolute path, or the name by which it ships or is found on the Hub, and its hash."""

    path: str
    sha256: str


def describe_base(path: str | Path, source: ModelSource) -> BaseModel:
    """Returns the description of the model at `path`, opened as `source`. It reads all parameters."""
    named = parse_hub_name(path) or shipped_model(path)
    return BaseModel(str(path) if named else str(as_path(path, "path").absolute()), hash_model(source))


def hash_model(source: ModelSource) -> str:
    """Returns the SHA-256 of a model's shape and of the float32 values of its parameters, one weight at a time.

    In a run on several hosts all of them must call it together, because reading a checkpoint waits for every host.
    """
    shape = dataclasses.asdict(source.config)
    del shape["context_length"]  # changes no value that a model computes
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    devices = np.array(jax.devices() if jax.process_count() > 1 else jax.devices()[:1])
    whole = NamedSharding(Mesh(devices, ("all",)), P())

    def add(array: jax.Array) -> None:
        digest.update(np.ascontiguousarray(array, "<f4").data)

    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(source.config)):
        name, in_layers = parameter_path(path), path[0].key == "layers"
        wanted = jax.ShapeDtypeStruct(leaf.shape[in_layers:], jnp.float32, sharding=whole)
        digest.update(name.encode())
        if in_layers:
            for layer in source.load_layers(name, wanted):
                add(layer)
        else:
            tree: Any = wanted
            for key in reversed(path):
                tree = {key.key: tree}
            add(jax.tree.leaves(source.load_rest(tree))[0])
    return digest.hexdigest()


def write_base(folder: Path, base: BaseModel) -> None:
    """Writes base_model.json."""
    write_atomically(path_of(folder) / BASE_MODEL, json.dumps(base._asdict(), indent=2))


def read_base(folder: Path) -> BaseModel:
    """Reads base_model.json. Raises UserError when it is missing or wrong."""
    path = path_of(folder) / BASE_MODEL
    tree = read_json(path)
    if {*tree} != {*BaseModel._fields} or not all(isinstance(value, str) for value in tree.values()):
        raise UserError(f"{path} must hold the texts path and sha256 of a base model")
    return BaseModel(**tree)


def check_base(found: BaseModel, wanted: BaseModel, where: Path) -> None:
    """Raises UserError unless two descriptions are of the same model. where: the folder of the adapter."""
    if found.sha256 != wanted.sha256:
        raise UserError(
            f"{found.path} is not the base model of the adapter in {where}: its parameters have the SHA-256 "
            f"{found.sha256[:12]}..., those of the base ({wanted.path}) had {wanted.sha256[:12]}..."
        )
