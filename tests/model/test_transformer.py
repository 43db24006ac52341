"""The model against float64 numpy, and its causality shown by gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.config import RopeScaling
from lsjax.model.transformer import forward, hidden_states, scan_layers
from tests.conftest import random_params
from tests.helpers import numpy_llama

LLAMA3 = RopeScaling(
    "llama3", factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_context_length=64
)
VARIANTS = {
    "grouped, tied": {},
    "multi-head": {"num_kv_heads": 4},
    "multi-query": {"num_kv_heads": 1},
    "untied": {"tie_embeddings": False},
    "wide heads": {"head_width": 16},
    "llama3 rope": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "linear rope": {"rope_scaling": RopeScaling("linear", factor=4.0)},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_hidden_states_and_logits_equal_numpy(name, tiny):
    config = dataclasses.replace(tiny, **VARIANTS[name])
    params = random_params(config, seed=1)
    tokens = np.array([[5, 9, 2, 2, 300, 17, 41], [7, 7, 1, 0, 319, 5, 6]])
    states = hidden_states(params, tokens, config)
    full = forward(params, tokens, config)
    assert states.shape == (config.num_layers, 2, 7, config.width)
    for row in range(2):
        expected = numpy_llama.hidden_states(params, tokens[row], config)
        np.testing.assert_allclose(states[:, row], expected, rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(full[row], numpy_llama.logits(params, expected[-1], config), rtol=2e-4, atol=2e-4)


def test_layer_mask_multiplies_what_a_layer_adds(tiny, tiny_params):
    tokens = np.array([[5, 9, 2, 300], [7, 7, 1, 0]])
    mask = np.array([[1, 0], [0, 1], [2.5, 1], [1, 0]], np.float32)
    logits = forward(tiny_params, tokens, tiny, jnp.asarray(mask))
    for row in range(2):
        expected = numpy_llama.hidden_states(tiny_params, tokens[row], tiny, layer_mask=mask[:, row])
        np.testing.assert_allclose(
            logits[row], numpy_llama.logits(tiny_params, expected[-1], tiny), rtol=2e-4, atol=2e-4
        )


def test_a_mask_for_the_whole_batch_equals_the_same_mask_per_sample(tiny, tiny_params):
    tokens = np.array([[5, 9, 2, 300], [7, 7, 1, 0]])
    whole = jnp.array([1.0, 0.0, 1.5, 1.0])
    per_sample = jnp.broadcast_to(whole[:, None], (4, 2))
    np.testing.assert_allclose(
        forward(tiny_params, tokens, tiny, whole), forward(tiny_params, tokens, tiny, per_sample), rtol=1e-5, atol=1e-5
    )


def test_packed_documents_do_not_see_each_other(tiny, tiny_params):
    tokens = np.array([[5, 9, 2, 300, 17, 41, 8]])
    segments, positions = np.array([[0, 0, 0, 1, 1, 1, 1]]), np.array([[0, 1, 2, 0, 1, 2, 3]])
    last, inputs = scan_layers(
        tiny_params, tokens, tiny, positions=positions, segment_ids=segments, read=lambda x, _: x
    )
    states = np.concatenate([inputs[1:], last[None]])
    alone = hidden_states(tiny_params, tokens[:, 3:], tiny)
    np.testing.assert_allclose(states[:, :, 3:], alone, rtol=1e-5, atol=1e-5)


def test_causality_by_gradients(tiny, tiny_params):
    """Checks that the logits at s depend on every input position up to s and on none after it."""
    config = dataclasses.replace(tiny, tie_embeddings=False)
    head, at = tiny_params["embed"].T, 3

    def squared_logits(inputs):
        params = tiny_params | {"embed": tiny_params["embed"].at[:6].set(inputs), "lm_head": head}
        return jnp.sum(forward(params, np.arange(6)[None], config)[0, at] ** 2)

    gradient = np.abs(jax.grad(squared_logits)(tiny_params["embed"][:6])).max(axis=1)
    assert (gradient[: at + 1] > 0).all()
    assert (gradient[at + 1 :] == 0).all()


def test_llama31_frequencies_equal_published_ratios():
    """Compares base over scaled frequency for Llama 3.2 1B (head width 64, factor 32) with the values of llama.cpp."""
    from lsjax.config import ModelConfig
    from lsjax.model.rope import inverse_frequencies

    plain = ModelConfig(head_width=64, rope_theta=500000.0)
    scaled = dataclasses.replace(plain, rope_scaling=RopeScaling("llama3", 32.0, 1.0, 4.0, 8192))
    ratio = inverse_frequencies(plain) / inverse_frequencies(scaled)
    np.testing.assert_allclose(ratio, [1.0] * 15 + [1.6513293, 3.2922628, 9.666731] + [32.0] * 14, rtol=1e-5)
