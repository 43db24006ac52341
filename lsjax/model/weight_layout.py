"""Layouts of weights for decoding, chosen so that verifying several tokens costs little more than decoding one.

Training stores a weight as an array [inputs..., outputs...]. Decoding turns it around once, after loading, into a
kernel [outputs..., inputs], one row per output, in one of two wrappers. `matmul` calls their `multiply`.

- `OutputMajor`, for TPU, GPU and every mesh: states times kernel, contracted over the last axes. XLA:TPU multiplies
  several tokens in this order. It would convert weights in another order at every call of a loop that verifies drafts
  (a second qkv and gate_up of those layers) and at every change between two kinds of rounds. XLA:GPU takes either.
- `LeftOperand`, for a single CPU: the same kernel as the left factor, W[outputs, inputs] @ X[inputs, tokens]. As the
  right factor, 2 to 8 tokens cost XLA:CPU 1.5 to 2.4 times one token, as the left factor 1.0 to 1.3 times (the
  narrower the model, the more).

`lay_out_weights` lays out all weights of a decoder; `inputs_first` turns one back.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# The weights of a layer, and how many of their axes are inputs.
INPUT_AXES = {"qkv": 1, "output": 3, "gate_up": 1, "down": 1}
# Up to this number of tokens, a number that is not a power of two costs XLA:CPU more than the next power of two.
_PADDED_TOKENS = 32


class OutputMajor(NamedTuple):
    """A weight that is multiplied from the right: kernel [outputs..., inputs], with the input axes merged into one."""

    kernel: jax.Array

    def multiply(self, x: jax.Array, axes: int, out_dtype: jnp.dtype | None = None) -> jax.Array:
        """Multiplies x [..., inputs...] by the weight; arguments as in `matmul`."""
        return contract_last(x, self.kernel, axes, out_dtype)


class LeftOperand(NamedTuple):
    """A weight that is multiplied from the left, for XLA:CPU: kernel [outputs..., inputs], as in OutputMajor."""

    kernel: jax.Array

    def multiply(self, x: jax.Array, axes: int, out_dtype: jnp.dtype | None = None) -> jax.Array:
        """Multiplies x [..., inputs...] by the weight; arguments as in `matmul`."""
        y = multiply_from_left(self.kernel, x.reshape(-1, self.kernel.shape[-1]), out_dtype)
        return y.reshape(*x.shape[:-axes], *self.kernel.shape[:-1])


def multiply_from_left(
    kernel: jax.Array, states: jax.Array, out_dtype: jnp.dtype | None, least_columns: int = 1
) -> jax.Array:
    """Multiplies a kernel [outputs..., K] as the left factor by states [T, K] -> [T, N], with N outputs in all.

    least_columns: states of fewer tokens are padded to as many, a power of two.
    """
    tokens = states.shape[0]
    if tokens <= _PADDED_TOKENS:
        padded = max(least_columns, 1 << (tokens - 1).bit_length())
        states = jnp.pad(states, ((0, padded - tokens), (0, 0)))
    kernel = kernel.reshape(-1, kernel.shape[-1])
    y = jnp.einsum("nk,tk->nt", kernel, states, preferred_element_type=out_dtype)
    # Without the barrier XLA folds the transpose into the product, which makes the weight the right factor again.
    return jax.lax.optimization_barrier(y)[:, :tokens].T


def contract_last(x: jax.Array, kernel: jax.Array, axes: int, out_dtype: jnp.dtype | None) -> jax.Array:
    """Multiplies x [..., inputs...] by a kernel [outputs..., inputs] -> [..., outputs...].

    axes: the number of input axes of x.
    """
    x = x.reshape(*x.shape[: x.ndim - axes], -1)
    return jnp.tensordot(x, kernel, ((-1,), (-1,)), preferred_element_type=out_dtype)


def outputs_first(weight: jax.Array, input_axes: int, stacked: bool = False) -> jax.Array:
    """Turns a weight [inputs..., outputs...] into a kernel [outputs..., inputs].

    stacked: both have an axis L in front.
    """
    weight = jnp.moveaxis(weight, range(stacked, stacked + input_axes), range(-input_axes, 0))
    return weight.reshape(*weight.shape[:-input_axes], math.prod(weight.shape[-input_axes:]))


def inputs_first(kernel: jax.Array, shape: tuple[int, ...], input_axes: int) -> jax.Array:
    """Undoes `outputs_first`: kernel [outputs..., inputs] -> weight of `shape`, [inputs..., outputs...]."""
    kernel = kernel.reshape(*shape[input_axes:], *shape[:input_axes])
    return jnp.moveaxis(kernel, range(-input_axes, 0), range(input_axes))


def lay_out_layers(layers: Any, layout: Callable[[jax.Array], OutputMajor | LeftOperand]) -> Any:
    """Lays out the weights of layers. Weights that already have a layout (int8) keep it; norms stay as they are."""

    def change(path, leaf):
        plain = isinstance(path[-1], jax.tree_util.DictKey) and path[-1].key in INPUT_AXES
        return layout(outputs_first(leaf, INPUT_AXES[path[-1].key])) if plain else leaf

    return jax.tree_util.tree_map_with_path(change, layers)


def lay_out_weights(
    weights: dict[str, Any], layout: Callable[[jax.Array], OutputMajor | LeftOperand]
) -> dict[str, Any]:
    """Lays out the weights of every layer and the head, for decoding.

    A tied embedding [V,D] already has its outputs as rows: OutputMajor leaves it, LeftOperand wraps it as the head.
    """
    weights = weights | {"layers": lay_out_layers(weights["layers"], layout)}
    head = weights.get("lm_head")
    if head is None:
        return weights | {"lm_head": layout(weights["embed"])} if layout is LeftOperand else weights
    return weights | {"lm_head": layout(outputs_first(head, 1)) if isinstance(head, jax.Array) else head}
