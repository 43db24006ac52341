"""Dropout schedules against the formulas in numpy, masks against their statistics and the compute they skip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.layerskip.dropout import draw_layer_mask, layer_dropout_rates, subset_pieces
from lsjax.model.transformer import forward

DEPTH = {
    "exponential": lambda l, L: np.exp(l * np.log(2) / (L - 1)) - 1,
    "linear": lambda l, L: l / (L - 1),
    "uniform": lambda l, L: 1.0,
}
TIME = {
    "constant": lambda t, T: 1.0,
    "exponential": lambda t, T: np.exp(t * np.log(2) / (T - 1)) - 1,
    "linear_decay": lambda t, T: 1 - t / (T - 1),
}


@pytest.mark.parametrize("depth", DEPTH)
@pytest.mark.parametrize("time", TIME)
@pytest.mark.parametrize("step", [0, 1, 500, 999])
def test_rates_are_the_formula(depth, time, step):
    rates = layer_dropout_rates(12, 0.2, step, 1000, depth, time)
    expected = [0.2 * TIME[time](step, 1000) * DEPTH[depth](l, 12) for l in range(12)]
    np.testing.assert_allclose(rates, expected, atol=1e-6)


def test_exponential_depth_spares_the_first_layer_and_hits_the_last_fully():
    rates = layer_dropout_rates(32, 0.1, 0, 10)
    assert rates[0] == 0
    np.testing.assert_allclose(rates[-1], 0.1, rtol=1e-6)
    np.testing.assert_allclose(np.mean(rates), 0.1 * 0.4445, rtol=1e-3)  # the paper's mean for 32 layers


def test_sample_masks_are_independent_draws_at_the_rates():
    rates = jnp.array([0.0, 0.3, 0.9])
    mask = np.asarray(draw_layer_mask(jax.random.key(3), rates, 20000))
    assert set(np.unique(mask)) == {0.0, 1.0}
    np.testing.assert_allclose(1 - mask.mean(axis=1), rates, atol=0.015)
    assert abs(np.corrcoef(mask[1], mask[2])[0, 1]) < 0.03


def test_rescaled_masks_keep_the_expectation():
    rates = jnp.array([0.0, 0.25, 0.5])
    mask = np.asarray(draw_layer_mask(jax.random.key(3), rates, 20000, rescale=True))
    np.testing.assert_allclose(mask.mean(axis=1), 1.0, atol=0.03)
    np.testing.assert_allclose(mask.max(axis=1), [1, 4 / 3, 2], rtol=1e-6)


def test_batch_mask_has_one_draw_a_layer():
    masks = [draw_layer_mask(jax.random.key(k), jnp.full(8, 0.5), 16, "batch") for k in range(200)]
    assert masks[0].shape == (8,)
    np.testing.assert_allclose(np.mean(masks), 0.5, atol=0.05)


def test_a_subset_is_as_large_on_every_device_and_unbiased():
    """8 rows on each of 3 devices in 4 groups: whole groups are kept, on average 1 - p of the rows, any of them, one
    device's whatever another's are."""
    rates = jnp.array([0.0, 0.1, 0.5, 0.7])
    draw = jax.jit(lambda key: draw_layer_mask(key, rates, 24, "subset", devices=3, groups=4))
    masks = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(5), 4000))).reshape(4000, 4, 3, 8)
    kept = masks.sum(axis=-1)
    assert (kept == kept[:, :, :1]).all()
    assert set(np.unique(kept)) <= {0, 2, 4, 6, 8}
    for layer, rate in enumerate(rates):
        assert set(np.unique(kept[:, layer])) == {2 * n for n in range(5) if abs(n - 4 * (1 - rate)) < 1 - 1e-6}
    np.testing.assert_allclose(masks.mean(axis=0), np.broadcast_to(1 - rates[:, None, None], (4, 3, 8)), atol=0.035)
    assert abs(np.corrcoef(masks[:, 2, 0, 0], masks[:, 2, 1, 0])[0, 1]) < 0.06
    assert abs(np.corrcoef(masks[:, 2, 0, 0], masks[:, 3, 0, 0])[0, 1]) < 0.06


def test_a_rescaled_subset_keeps_the_expectation():
    masks = [draw_layer_mask(jax.random.key(k), jnp.full(3, 0.3), 8, "subset", True, 2, 4) for k in range(400)]
    np.testing.assert_allclose(np.mean(masks), 1.0, atol=0.02)
    np.testing.assert_allclose(np.max(masks), 1 / 0.7, rtol=1e-6)


@pytest.mark.parametrize(("max_rate", "pieces"), [(0.0, (8,)), (0.2, (6, 2)), (0.5, (4, 2, 2)), (0.9, (0, 2, 2, 2, 2))])
def test_what_no_rate_drops_is_run_at_once(max_rate, pieces):
    assert subset_pieces(max_rate, 8, 4) == pieces
    masks = [draw_layer_mask(jax.random.key(k), jnp.full(1, max_rate), 8, "subset", groups=4) for k in range(100)]
    assert min(mask.sum() for mask in masks) >= pieces[0]


def test_batch_granularity_really_skips_the_layer(tiny, tiny_params):
    """A layer whose parameters are NaN poisons the output, unless its compute is skipped and not just masked."""
    poisoned = jax.tree.map(lambda a: a.at[2].set(jnp.nan), tiny_params["layers"])
    params = tiny_params | {"layers": poisoned}
    tokens = np.array([[5, 9, 2, 300]])
    run = jax.jit(lambda mask: forward(params, tokens, tiny, mask))
    assert np.isfinite(run(jnp.array([1.0, 1.0, 0.0, 1.0]))).all()
    assert np.isnan(run(jnp.array([1.0, 1.0, 1.0, 1.0]))).any()
