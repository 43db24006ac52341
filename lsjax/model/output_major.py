"""Weights as decoding wants them, with their outputs as rows: kernel [outputs..., inputs].

XLA:TPU takes several tokens through weights in this order. Others it would bring into it, at every call of a loop that
verifies drafts (a second qkv and gate_up of those layers) and at every change between two kinds of rounds; XLA:GPU
takes either. XLA:CPU is fast only where they also stand on the left, W[outputs, inputs] @ X[inputs, tokens]: on the
right, 2 to 8 tokens cost it 1.5 to 2.4 times one token, on the left 1.0 to 1.3 times (more, the narrower the model).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Weights of a layer, and how many of their axes are inputs.
INPUT_AXES = {"qkv": 1, "output": 3, "gate_up": 1, "down": 1}
_PADDED_TOKENS = 32  # up to as many, a number of tokens that is no power of two costs more than the next that is one


class OutputMajor(NamedTuple):
    """kernel [outputs..., inputs], the axes of the inputs as one."""

    kernel: jax.Array

    def multiply(self, x: jax.Array, axes: int, out_dtype: jnp.dtype | None = None) -> jax.Array:
        """x [..., inputs] times the weight, as `matmul`."""
        return contract_last(x, self.kernel, axes, out_dtype)


class LeftOperand(NamedTuple):
    """The same kernel, for XLA:CPU."""

    kernel: jax.Array

    def multiply(self, x: jax.Array, axes: int, out_dtype: jnp.dtype | None = None) -> jax.Array:
        """x [..., inputs] times the weight, as `matmul`."""
        outputs, inputs = self.kernel.shape[:-1], self.kernel.shape[-1]
        columns = x.reshape(-1, inputs)
        tokens = columns.shape[0]
        if tokens <= _PADDED_TOKENS:
            columns = jnp.pad(columns, ((0, (1 << (tokens - 1).bit_length()) - tokens), (0, 0)))
        kernel = self.kernel.reshape(-1, inputs)
        y = jnp.einsum("nk,tk->nt", kernel, columns, preferred_element_type=out_dtype)
        # XLA would fold the transpose into the product, and make the weight its right operand again.
        y = jax.lax.optimization_barrier(y)
        return y[:, :tokens].T.reshape(*x.shape[:-axes], *outputs)


def contract_last(x: jax.Array, kernel: jax.Array, axes: int, out_dtype: jnp.dtype | None) -> jax.Array:
    """x [..., inputs], of `axes` axes, with kernel [outputs..., inputs] -> [..., outputs...]."""
    x = x.reshape(*x.shape[: x.ndim - axes], -1)
    return jnp.tensordot(x, kernel, ((-1,), (-1,)), preferred_element_type=out_dtype)


def outputs_first(weight: jax.Array, input_axes: int, stacked: bool = False) -> jax.Array:
    """[inputs..., outputs...] -> [outputs..., inputs]; of layers that are stacked, each with an axis L before."""
    weight = jnp.moveaxis(weight, range(stacked, stacked + input_axes), range(-input_axes, 0))
    return weight.reshape(*weight.shape[:-input_axes], math.prod(weight.shape[-input_axes:]))


def inputs_first(kernel: jax.Array, shape: tuple[int, ...], input_axes: int) -> jax.Array:
    """[outputs..., inputs] -> [inputs..., outputs...] of that shape, as `outputs_first` found it."""
    kernel = kernel.reshape(*shape[input_axes:], *shape[:input_axes])
    return jnp.moveaxis(kernel, range(-input_axes, 0), range(input_axes))


def laid_out(layers: Any, layout: Callable[[jax.Array], OutputMajor | LeftOperand]) -> Any:
    """Layers with their weights in this order; what has a layout of its own keeps it."""

    def change(path, leaf):
        plain = isinstance(path[-1], jax.tree_util.DictKey) and path[-1].key in INPUT_AXES
        return layout(outputs_first(leaf, INPUT_AXES[path[-1].key])) if plain else leaf

    return jax.tree_util.tree_map_with_path(change, layers)


def with_output_major(
    weights: dict[str, Any], layout: Callable[[jax.Array], OutputMajor | LeftOperand]
) -> dict[str, Any]:
    """Decoder weights with those of every layer and the head in this order. A tied embedding lies in it already."""
    weights = weights | {"layers": laid_out(weights["layers"], layout)}
    head = weights.get("lm_head")
    if head is None:
        return weights | {"lm_head": layout(weights["embed"])} if layout is LeftOperand else weights
    return weights | {"lm_head": layout(outputs_first(head, 1)) if isinstance(head, jax.Array) else head}
