"""Weights in int8: rounding against its definition, and a whole model against numpy on the weights that they encode."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.model.matmul import matmul
from lsjax.model.quantization import is_quantized, quantize_params, quantize_weight, states_in_int8
from lsjax.model.transformer import forward
from tests.conftest import random_params
from tests.helpers import numpy_llama


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "inputs"), [((32, 2, 4, 8), 1), ((2, 3, 8, 32), 3), ((24, 17), 1)])
def test_every_entry_is_within_half_a_step(shape, inputs, dtype):
    """Checks channels of very different sizes, one of them zeros. The scale is a channel's largest entry / 127."""
    random = np.random.default_rng(0)
    weight = random.normal(size=shape) * 10.0 ** random.integers(-6, 3, shape[inputs:])
    weight.reshape(-1, weight[(0,) * inputs].size)[:, 3] = 0
    weight = jnp.asarray(weight, dtype)
    values, scale = map(np.asarray, quantize_weight(weight, inputs))
    assert (values.dtype, scale.dtype) == ("int8", "float32")
    assert (values.shape, scale.shape) == ((*shape[inputs:], np.prod(shape[:inputs])), shape[inputs:])
    w, s = (a.astype(np.float64) for a in (np.asarray(weight), scale))
    q = np.moveaxis(values.astype(np.float64), -1, 0).reshape(shape)
    axes = tuple(range(inputs))
    np.testing.assert_allclose(s, np.abs(w).max(axes) / 127, rtol=1e-6)
    assert (np.abs(w - q * s) <= s / 2 * (1 + 1e-4)).all()
    assert np.abs(q).max() == 127
    np.testing.assert_array_equal((q * s).reshape(-1, s.size)[:, 3], 0)


def test_a_stack_is_rounded_layer_by_layer():
    stack = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, 5, 4, 6)))
    together = quantize_weight(stack, 3, stacked=True)
    for index in range(3):
        values, scale = quantize_weight(stack[index], 3)
        np.testing.assert_array_equal(together.values[index], values)
        np.testing.assert_array_equal(together.scale[index], scale)


@pytest.mark.parametrize("axes", [1, 3])
def test_a_product_equals_that_with_the_weight_written_out(axes):
    random = np.random.default_rng(2)
    shape = (2, 3, 8, 5) if axes == 3 else (8, 3, 5)
    weight = quantize_weight(jnp.asarray(random.normal(size=shape)), axes)
    x = random.normal(size=(2, 4, 2, 3, 8) if axes == 3 else (2, 4, 8)).astype(np.float32)
    dense = written_out(weight).reshape(shape)
    np.testing.assert_allclose(matmul(x, weight, axes), np.tensordot(np.float64(x), dense, axes), rtol=1e-5, atol=1e-5)
    assert matmul(x.astype("bfloat16"), weight, axes).dtype == "bfloat16"
    assert matmul(x.astype("bfloat16"), weight, axes, jnp.float32).dtype == "float32"


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("tokens", [1, 2, 5, 40])
def test_a_product_of_integers_is_that_of_states_rounded_by_token(axes, tokens):
    """Checks tokens of very different sizes, one of them zeros, against numpy in float64."""
    random = np.random.default_rng(4)
    shape = (2, 3, 8, 5) if axes == 3 else (48, 3, 5)
    weight = quantize_weight(jnp.asarray(random.normal(size=shape)), axes)
    x = random.normal(size=(tokens, 48)) * 10.0 ** random.integers(-6, 3, (tokens, 1))
    x[tokens // 2] = 0
    x = x.astype(np.float32)
    scale = np.abs(np.float64(x)).max(-1, keepdims=True) / 127
    rounded = np.round(x / np.where(scale > 0, scale, 1)) * scale
    expected = rounded @ written_out(weight).reshape(48, -1)
    (left,) = states_in_int8((weight,), rounded=True)
    states = x.reshape(tokens, 2, 3, 8) if axes == 3 else x
    found = np.asarray(jax.jit(lambda x: matmul(x, left, axes))(states))
    assert found.shape == (tokens, *shape[axes:])
    # One state in a thousand may lie on the border between two values, where float32 rounds to the other one.
    errors = np.abs(found.reshape(tokens, -1) - expected) / np.maximum(np.abs(expected).max(-1, keepdims=True), 1e-30)
    assert np.median(errors) < 1e-6
    assert errors.max() < 0.01
    assert matmul(states.astype("bfloat16"), left, axes, jnp.float32).dtype == "float32"
    assert matmul(states.astype("bfloat16"), left, axes).dtype == "bfloat16"


def test_a_token_is_rounded_as_it_would_be_alone():
    """Checks every token of 7, 8 and 33 against the same token alone, bit for bit: a verified draft must match."""
    random = np.random.default_rng(5)
    (left,) = states_in_int8((quantize_weight(jnp.asarray(random.normal(size=(96, 40))), 1),), rounded=True)
    product = jax.jit(lambda x: matmul(x, left))
    for tokens in (7, 8, 33):
        x = random.normal(size=(tokens, 96)).astype(np.float32)
        np.testing.assert_array_equal(product(x), np.stack([product(row[None])[0] for row in x]))


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_weights_that_int8_stands_for(tiny, tied):
    config = dataclasses.replace(tiny, tie_embeddings=tied)
    params = random_params(config)
    rounded = quantize_params(params)
    shapes = params | {"lm_head": jax.ShapeDtypeStruct((config.width, config.vocab_size), "float32")}
    dense = jax.tree.map(
        lambda a, like: written_out(a, like.ndim > 2).reshape(like.shape) if is_quantized(a) else a,
        rounded,
        shapes,
        is_leaf=is_quantized,
    )
    np.testing.assert_array_equal(rounded["embed"], params["embed"])
    names = {jax.tree_util.keystr(path).split("'")[-2] for path, leaf in leaves(rounded) if is_quantized(leaf)}
    assert names == {"qkv", "output", "gate_up", "down", "lm_head"}
    tokens = np.random.default_rng(3).integers(config.vocab_size, size=12)
    found = np.asarray(forward(rounded, tokens[None], config)[0])
    expected = numpy_llama.logits(dense, numpy_llama.hidden_states(dense, tokens, config)[-1], config)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    # The effect of rounding is far larger than that tolerance.
    exact = np.asarray(forward(params, tokens[None], config)[0])
    assert np.abs(found - exact).max() > 2e-3 * np.abs(expected).max()


def leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantized)


def written_out(weight, stacked=False):
    """Returns the weight that int8 encodes, [inputs, outputs...] in float64; a stack keeps its layer axis in front."""
    return np.moveaxis(np.float64(weight.values) * np.float64(weight.scale)[..., None], -1, int(stacked))
