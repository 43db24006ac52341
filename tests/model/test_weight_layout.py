"""Laid out weights multiply like the formula for any number of tokens, and the decoding loop copies none of them."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.decoding.forward import decoder_weights, init_cache, prefill
from lsjax.decoding.program import DecodeProgram
from lsjax.decoding.strategies import SelfSpeculative
from lsjax.model.matmul import matmul
from lsjax.model.weight_layout import LeftOperand, OutputMajor, outputs_first
from tests.conftest import VARIED
from tests.helpers.numpy_llama import hidden_states, logits
from tests.helpers.prompts import bare_batch


@pytest.mark.parametrize("layout", [OutputMajor, LeftOperand])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 7, 8, 13, 33])
@pytest.mark.parametrize(("inputs", "outputs"), [((6,), (2, 3, 5)), ((2, 3, 5), (6,)), ((7,), (11,))], ids=str)
def test_a_product_equals_the_formula(layout, tokens, inputs, outputs):
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(*inputs, *outputs)), rng.normal(size=(tokens, 1, *inputs))
    truth = x.reshape(tokens, -1) @ weight.reshape(np.prod(inputs), -1)
    ours = matmul(jnp.float32(x), layout(outputs_first(jnp.float32(weight), len(inputs))), len(inputs))
    assert ours.shape == (tokens, 1, *outputs)
    np.testing.assert_allclose(np.asarray(ours).reshape(tokens, -1), truth, rtol=1e-5, atol=1e-5)


def test_the_loop_multiplies_and_updates_in_place(varied_params):
    """Checks that in the compiled loop weights are left operands, and that neither weights nor cache are copied."""
    config = dataclasses.replace(VARIED, context_length=4096)
    batch = bare_batch(np.ones((1, 2048), np.int32), np.array([2048], np.int32), 64)
    program = DecodeProgram(config, SelfSpeculative(2, 4), batch)
    program.compile(decoder_weights(varied_params, jnp.float32, for_cpu=True))
    results = {
        tuple(map(int, shape.split(",")))
        for shape in re.findall(r"= f32\[(\d+,\d+)\]\{[\d,]*\} dot\(", program._programs.decode.as_text())
    }
    c = config
    outputs = {c.num_kv_heads * (2 + 2) * c.head_width, c.width, 2 * c.feed_forward_width, c.vocab_size}
    assert results == {(rows, tokens) for rows in outputs for tokens in (1, 8)}  # 5 tokens are padded to 8
    memory = program._programs.decode.memory_analysis()
    cache_bytes = 2 * c.num_layers * c.num_kv_heads * 2176 * c.head_width * 4
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes


@pytest.mark.parametrize("layout", [OutputMajor, LeftOperand])
def test_a_model_decodes_with_them(varied_params, layout):
    weights = decoder_weights(varied_params, jnp.float32, for_cpu=layout is LeftOperand)
    assert isinstance(weights["layers"][0]["attention"]["qkv"], layout)
    tokens = np.random.default_rng(0).integers(0, VARIED.vocab_size, 7)
    cache = init_cache(VARIED, 1, 16, jnp.float32)
    ours, _ = prefill(weights, jnp.asarray(tokens[None]), jnp.array([7]), cache, VARIED, range(VARIED.num_layers))
    states = hidden_states(varied_params, tokens, VARIED)
    np.testing.assert_allclose(ours[0], logits(varied_params, states[-1][-1], VARIED), rtol=2e-4, atol=2e-4)
