"""LoRA (arXiv 2106.09685): a frozen weight W plus the product of two thin matrices that are trained, W + scale A B.

An adapter is a tree like the parameters, with {lora_a, lora_b} in place of each matrix that it changes and without all
other parameters. A keeps the input axes of its matrix and B the output axes: W [inputs..., outputs...],
A [inputs..., r], B [r, outputs...], with an axis L in front for layers. scale is alpha / r.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from lsjax.model.weight_layout import INPUT_AXES

Adapter = dict[str, Any]
Factors = dict[str, Any]  # {lora_a, lora_b}

# Every matrix of a model, and how many of its axes are inputs, after the axis L. Rows of the embedding are its inputs.
MATRICES = {"embed": 1, "lm_head": 1} | {
    f"layers/{module}/{name}": INPUT_AXES[name]
    for module, name in (
        ("attention", "qkv"),
        ("attention", "output"),
        ("feed_forward", "gate_up"),
        ("feed_forward", "down"),
    )
}


@functools.partial(jax.tree_util.register_dataclass, data_fields=("weight", "lora_a", "lora_b"), meta_fields=("scale",))
@dataclasses.dataclass(frozen=True)
class LoraWeight:
    """A weight that `matmul` multiplies by as W + scale A B, without computing that sum."""

    weight: jax.Array
    lora_a: jax.Array
    lora_b: jax.Array
    scale: float


def factor_shapes(path: str, shape: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of A and B for the matrix at `path` of this shape."""
    stack, sizes = (shape[:1], shape[1:]) if path.startswith("layers/") else ((), shape)
    inputs = MATRICES[path]
    return (*stack, *sizes[:inputs], rank), (*stack, rank, *sizes[inputs:])


def init_adapter(key: jax.Array, shapes: Any, targets: tuple[str, ...], rank: int) -> Adapter:
    """Draws a float32 adapter: A uniform within 1 / sqrt(number of inputs), as PEFT does, and B zero.

    shapes: the parameters, or their description. targets: paths of MATRICES.
    """
    adapter: Adapter = {}
    for target, own_key in zip(targets, jax.random.split(key, len(targets)), strict=True):
        *parents, name = target.split("/")
        matrix = functools.reduce(lambda tree, part: tree[part], target.split("/"), shapes)
        a, b = factor_shapes(target, matrix.shape, rank)
        bound = math.prod(a[-1 - MATRICES[target] : -1]) ** -0.5
        place = functools.reduce(lambda tree, part: tree.setdefault(part, {}), parents, adapter)
        place[name] = {"lora_a": jax.random.uniform(own_key, a, minval=-bound, maxval=bound), "lora_b": jnp.zeros(b)}
    return adapter


def factors_of(adapter: Adapter, path: str) -> Factors | None:
    """Returns the factors of the parameter at a path; None when the adapter leaves it as it is."""
    return functools.reduce(lambda tree, key: tree and tree.get(key), path.split("/"), adapter)


def adapt(params: Any, adapter: Adapter, scale: float) -> Any:
    """Returns parameters for training and evaluation: those of layers become LoraWeight, the others are merged.

    The embedding and the head are read in several ways, and their product A B costs little beside the logits.
    """

    def change(path, weight):
        factors = factors_of(adapter, _name(path))
        if factors is None:
            return weight
        if path[0].key == "layers":
            return LoraWeight(weight, **factors, scale=scale)
        return merge_weight(weight, factors, scale)

    return jax.tree_util.tree_map_with_path(change, params)


def merge(params: Any, adapter: Adapter, scale: float) -> Any:
    """Returns plain parameters with A B added."""

    def change(path, weight):
        factors = factors_of(adapter, _name(path))
        return weight if factors is None else merge_weight(weight, factors, scale, stacked=path[0].key == "layers")

    return jax.tree_util.tree_map_with_path(change, params)


def _name(path: Any) -> str:
    return "/".join(key.key for key in path)


def merge_weight(weight: jax.Array, factors: Factors, scale: float, stacked: bool = False) -> jax.Array:
    """Returns W + scale A B in the dtype of W, summed in float32. stacked: all three have an axis L in front."""

    def product(a, b):
        return jnp.tensordot(a, b, 1, precision="highest", preferred_element_type=jnp.float32)

    update = (jax.vmap(product) if stacked else product)(factors["lora_a"], factors["lora_b"])
    return (weight.astype(jnp.float32) + scale * update).astype(weight.dtype)
