"""Models with a LoRA adapter: reads the adapter of a training workdir, and merges adapters while models are read."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.config import ModelConfig
from lsjax.data.tokenizer import Tokenizer
from lsjax.errors import UserError
from lsjax.io import checkpoints
from lsjax.io.base_model import BaseModel, read_base
from lsjax.io.source import ModelSource
from lsjax.io.tensors import all_finite, not_finite, parameter_path
from lsjax.io.workdir import read_config
from lsjax.model import lora
from lsjax.model.lora import Factors, factor_shapes, factors_of, merge_weight
from lsjax.model.transformer import Params, abstract_params


class Adapter(NamedTuple):
    """An adapter in memory.

    where: its folder. factors: as lsjax/model/lora.py describes them, in numpy. scale: the factor of A B.
    rank: that of all factors; 0 for an adapter of PEFT, whose modules may differ. step: of a run's checkpoint.
    base: the model that it changes; None when that is not known.
    """

    where: Path
    factors: lora.Adapter
    scale: float
    rank: int = 0
    step: int | None = None
    base: BaseModel | None = None


def read_run_adapter(workdir: Path) -> Adapter:
    """Reads the adapter in the latest checkpoint of a run with LoRA."""
    config = read_config(workdir)
    step, factors = checkpoints.load_stored(workdir)
    rank = config.training.lora_rank
    return Adapter(workdir, factors, config.training.lora_alpha / rank, rank, step, read_base(workdir))


def check_adapter(adapter: Adapter, config: ModelConfig) -> None:
    """Raises UserError that names the first factor that does not fit a model of this shape, or is not finite."""
    shapes = {
        parameter_path(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config))
    }
    for path, factor in jax.tree_util.tree_leaves_with_path(adapter.factors):
        *parents, side = (key.key for key in path)
        name = "/".join(parents)
        if name not in lora.MATRICES or name not in shapes:
            raise UserError(f"{adapter.where} is an adapter for another model: this one has no matrix {name}")
        rank = factor.shape[-1] if side == "lora_a" else factor.shape[name.startswith("layers/")]
        wanted = factor_shapes(name, shapes[name], rank)[side == "lora_b"]
        if factor.shape != wanted:
            raise UserError(
                f"{adapter.where} is an adapter for another model: {name}/{side} has the shape {list(factor.shape)}, "
                f"this model needs {list(wanted)}"
            )
        if not all_finite(np.ascontiguousarray(factor)):
            raise UserError(f"{adapter.where}: {not_finite(f'{name}/{side}')}")


@dataclasses.dataclass(frozen=True)
class AdaptedSource:
    """A model with an adapter. What it reads are merged parameters, W + scale A B, in the dtype asked for."""

    base: ModelSource
    adapter: Adapter
    config: ModelConfig
    tokenizer: Tokenizer
    step: int | None

    def __post_init__(self):
        check_adapter(self.adapter, self.config)

    def load_params(self, abstract: Params) -> Params:
        return self._merged(self.base.load_params(abstract))

    def load_rest(self, abstract: Params) -> Params:
        return self._merged(self.base.load_rest(abstract))

    def load_layers(self, name: str, abstract: jax.ShapeDtypeStruct) -> Iterator[jax.Array]:
        layers = self.base.load_layers(name, abstract)
        factors = factors_of(self.adapter.factors, name)
        for number, weight in enumerate(layers):
            own = factors and {side: factor[number] for side, factor in factors.items()}
            yield weight if own is None else self._merge(weight, own)

    def load_exit_adapter(self) -> None:
        """Returns None: an exit's adapter of the base has not learned from the merged model."""

    def stored_dtypes(self) -> Params:
        return self.base.stored_dtypes()

    def _merged(self, params: Params) -> Params:
        """Merges parameter by parameter, so that memory holds only one of them twice."""
        leaves, tree = jax.tree_util.tree_flatten_with_path(params)
        del params
        paths, weights = [path for path, _ in leaves], [weight for _, weight in leaves]
        del leaves
        for place, path in enumerate(paths):
            factors = factors_of(self.adapter.factors, parameter_path(path))
            if factors is not None:
                weights[place] = self._merge(weights[place], factors, stacked=path[0].key == "layers")
        return tree.unflatten(weights)

    def _merge(self, weight: jax.Array, factors: Factors, stacked: bool = False) -> jax.Array:
        merged = _merge(weight, factors, scale=self.adapter.scale, stacked=stacked, sharding=weight.sharding)
        if not jnp.isfinite(merged).all():
            raise UserError(f"{self.adapter.where}: merged into the model, it gives weights that are infinite")
        return merged


@functools.partial(jax.jit, static_argnames=("scale", "stacked", "sharding"))
def _merge(weight: jax.Array, factors: Factors, scale: float, stacked: bool, sharding: Any) -> jax.Array:
    return jax.lax.with_sharding_constraint(merge_weight(weight, factors, scale, stacked), sharding)
