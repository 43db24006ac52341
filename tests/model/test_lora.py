"""LoRA's mathematics: against numpy in float64, and against the model whose weights are merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsjax
from lsjax.model.lora import MATRICES, LoraWeight, adapt, factor_shapes, init_adapter, merge
from lsjax.model.matmul import matmul
from lsjax.model.transformer import abstract_params, exit_logits, scan_layers

TOKENS = np.random.default_rng(0).integers(0, 320, (2, 16))
SCALE = 0.75


def random_adapter(config, targets, rank=3, seed=0):
    """Returns an adapter whose B is not zero, so large that it changes every logit."""
    adapter = init_adapter(jax.random.key(seed), abstract_params(config), targets, rank)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.3, a.shape), jnp.float32), adapter)


def adapted_logits(params, adapter, config):
    @jax.jit
    def run(params, adapter):
        params = adapt(params, adapter, SCALE)
        return exit_logits(params, scan_layers(params, TOKENS, config)[0], config)

    return run(params, adapter)


def all_matrices(config):
    return tuple(path for path in MATRICES if not (config.tie_embeddings and path == "lm_head"))


@pytest.mark.parametrize(("axes", "shape"), [(1, (6, 2, 5)), (3, (2, 3, 4, 7))])
def test_a_product_is_that_with_the_sum(axes, shape):
    rng = np.random.default_rng(0)
    inputs, outputs = shape[:axes], shape[axes:]
    x, w = rng.normal(size=(3, 4, *inputs)), rng.normal(size=shape)
    a, b = rng.normal(size=(*inputs, 2)), rng.normal(size=(2, *outputs))
    expected = np.tensordot(x, w + SCALE * np.tensordot(a, b, 1), axes)
    x, w, a, b = (np.float32(array) for array in (x, w, a, b))
    np.testing.assert_allclose(matmul(jnp.asarray(x), LoraWeight(w, a, b, SCALE), axes), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_adapter_is_the_base_bit_for_bit(tied, tiny, varied, tiny_params, varied_params):
    config, params = (tiny, tiny_params) if tied else (varied, varied_params)
    adapter = init_adapter(jax.random.key(0), params, all_matrices(config), 4)
    assert all(float(jnp.abs(a).min()) > 0 for a in jax.tree.leaves(adapter) if a.any())  # A is drawn, B is zero
    expected = jax.jit(lsjax.forward, static_argnums=2)(params, TOKENS, config)
    np.testing.assert_array_equal(adapted_logits(params, adapter, config), expected)
    jax.tree.map(np.testing.assert_array_equal, merge(params, adapter, SCALE), params)


@pytest.mark.parametrize("tied", [True, False])
def test_merged_weights_give_the_same_logits(tied, tiny, varied, tiny_params, varied_params):
    """Adapts every matrix, a tied embedding in both its places among them."""
    config, params = (tiny, tiny_params) if tied else (varied, varied_params)
    adapter = random_adapter(config, all_matrices(config))
    logits = adapted_logits(params, adapter, config)
    expected = np.asarray(lsjax.forward(merge(params, adapter, SCALE), TOKENS, config))
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(expected - lsjax.forward(params, TOKENS, config)).max() > 0.1 * np.abs(expected).max()


def test_merging_is_the_formula_in_every_layer(tiny, tiny_params):
    adapter = random_adapter(tiny, ("embed", "layers/attention/output"))
    merged = merge(tiny_params, adapter, SCALE)
    factors, output = adapter["layers"]["attention"]["output"], tiny_params["layers"]["attention"]["output"]
    for layer in range(tiny.num_layers):
        a, b = (np.float64(factors[side][layer]) for side in ("lora_a", "lora_b"))
        expected = output[layer] + SCALE * np.einsum("kghr,rd->kghd", a, b)
        np.testing.assert_allclose(merged["layers"]["attention"]["output"][layer], expected, rtol=1e-5, atol=1e-6)
    a, b = (np.float64(adapter["embed"][side]) for side in ("lora_a", "lora_b"))
    np.testing.assert_allclose(merged["embed"], tiny_params["embed"] + SCALE * a @ b, rtol=1e-5, atol=1e-6)
    assert merged["layers"]["feed_forward"]["down"] is tiny_params["layers"]["feed_forward"]["down"]


def test_factors_have_the_axes_of_their_matrix():
    assert factor_shapes("layers/attention/qkv", (4, 32, 2, 4, 8), 3) == ((4, 32, 3), (4, 3, 2, 4, 8))
    assert factor_shapes("layers/attention/output", (4, 2, 2, 8, 32), 3) == ((4, 2, 2, 8, 3), (4, 3, 32))
    assert factor_shapes("lm_head", (32, 320), 3) == ((32, 3), (3, 320))
