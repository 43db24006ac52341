"""Bad arguments of the public model functions: one line for each kind, and nothing of it in a trace."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsjax
from lsjax.config import Config
from lsjax.errors import UserError
from lsjax.model.transformer import forward, hidden_states

IDS = np.array([[5, 9, 319], [0, 7, 1]])

BAD_TOKENS = {
    "above the vocabulary": ([[5, 320]], r"tokens has the id 320; ids of this model are 0\.\.319"),
    "negative": (jnp.array([[5, -1]]), r"tokens has the id -1; ids of this model are 0\.\.319"),
    "beyond 32 bits": ([[2**40]], "tokens has the id 1099511627776"),
    "beyond 64 bits": ([[2**70]], "tokens must be integers"),
    "floats": (np.ones((1, 2)), r"tokens must be integers, got float64\[1, 2\]"),
    "booleans": (np.ones((1, 2), bool), r"tokens must be integers, got bool\[1, 2\]"),
    "characters": ([["a", "b"]], "tokens must be integers"),
    "text": ("abc", r"tokens must be ids \[B,S\] .*, got 'abc'"),
    "nothing": (None, r"tokens must be ids \[B,S\]"),
    "one row": ([5, 9], r"tokens must be ids \[B,S\] .*, got \[5, 9\]"),
    "three axes": (IDS[None], r"tokens must be ids \[B,S\] .*, got int64\[1, 2, 3\]"),
    "no token": (np.zeros((1, 0), int), r"tokens must be ids \[B,S\]"),
    "no row": (np.zeros((0, 3), int), r"tokens must be ids \[B,S\]"),
    "ragged": ([[1], [1, 2]], "tokens must be an array with rows of equal length"),
    "keys": (jax.random.split(jax.random.key(0), (1, 2)), "tokens must be integers"),
}


@pytest.mark.parametrize("function", [forward, hidden_states], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", BAD_TOKENS)
def test_bad_tokens_are_refused(function, name, tiny, tiny_params):
    tokens, message = BAD_TOKENS[name]
    check_one_line(message, lambda: function(tiny_params, tokens, tiny))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones(3), r"layer_mask must be numbers \[4\] or \[4, 2\] .*, got float64\[3\]"),
        (np.ones((2, 4)), r"layer_mask must be numbers .*, got float64\[2, 4\]"),
        (1.0, r"layer_mask must be numbers .*, got 1\.0"),
        ([[1], [1, 0], [1], [1]], "layer_mask must be an array with rows of equal length"),
        (["on"] * 4, "layer_mask must be numbers"),
        (np.ones(4) * 1j, "layer_mask must be numbers"),
        (np.array([1, 1, np.nan, 1]), "layer_mask must be finite"),
        (jnp.array([1, 1, jnp.inf, 1]), "layer_mask must be finite"),
    ],
    ids=str,
)
def test_a_bad_layer_mask_is_refused(mask, message, tiny, tiny_params):
    check_one_line(message, lambda: forward(tiny_params, IDS, tiny, mask))


def test_a_layer_mask_may_be_a_list_or_boolean(tiny, tiny_params):
    expected = forward(tiny_params, IDS, tiny, jnp.array([1.0, 0.0, 1.0, 1.0]))
    for mask in ([1, 0, 1, 1], np.array([True, False, True, True])):
        np.testing.assert_array_equal(forward(tiny_params, IDS, tiny, mask), expected)


@pytest.mark.parametrize("function", [forward, hidden_states], ids=lambda f: f.__name__)
def test_parameters_and_configuration_of_different_models_are_refused(function, tiny, tiny_params):
    wider = dataclasses.replace(tiny, width=64)
    deeper = dataclasses.replace(tiny, num_layers=5)
    for params, config, message in (
        (tiny_params, Config(), "config must be a ModelConfig, such as model.config, got a Config"),
        (tiny_params, tiny.to_dict(), "config must be a ModelConfig, such as model.config, got a dict"),
        (None, tiny, "params must be a dict .* such as model.params, got None"),
        ({"layers": {}}, tiny, "params must be a dict of embed, layers and final_norm, .* got a dict"),
        (tiny_params, wider, r"embed has the shape \[320, 32\], but config.width is 64"),
        (tiny_params, deeper, r"layers are not stacked as \[5, ...\]"),
    ):
        check_one_line(message, lambda params=params, config=config: function(params, IDS, config))


def test_a_trace_checks_shapes_and_dtypes_but_no_values(tiny, tiny_params):
    """Outside the vocabulary a traced id goes unnoticed; the program has nothing that a host would wait for."""
    run = jax.jit(lambda tokens: lsjax.forward(tiny_params, tokens, tiny))
    assert run(np.array([[5, 320]])).shape == (1, 2, 320)
    np.testing.assert_allclose(run(IDS), lsjax.forward(tiny_params, IDS, tiny), rtol=1e-4, atol=1e-5)
    program = str(jax.make_jaxpr(lambda tokens: lsjax.forward(tiny_params, tokens, tiny))(IDS))
    assert "callback" not in program
    check_one_line(r"tokens must be integers, got float32\[1, 2\]", lambda: run(np.ones((1, 2))))
    check_one_line(r"tokens must be ids \[B,S\] .*, got int32\[3\]", lambda: run(np.arange(3)))


def check_one_line(message, call):
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
