"""Dropout schedules against the formulas in numpy; masks by their statistics and by the compute that they skip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.errors import UserError
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


def test_batch_mask_has_one_draw_per_layer():
    masks = [draw_layer_mask(jax.random.key(k), jnp.full(8, 0.5), 16, "batch") for k in range(200)]
    assert masks[0].shape == (8,)
    np.testing.assert_allclose(np.mean(masks), 0.5, atol=0.05)


def test_a_subset_is_as_large_on_every_device_and_unbiased():
    """Draws for 8 rows in 4 groups on each of 3 devices.

    Whole groups are kept, each row with probability 1 - p, and the rows of one device do not depend on another's.
    """
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
    """Poisons a layer with NaN parameters; the output stays finite only if the layer is skipped and not just masked."""
    poisoned = jax.tree.map(lambda a: a.at[2].set(jnp.nan), tiny_params["layers"])
    params = tiny_params | {"layers": poisoned}
    tokens = np.array([[5, 9, 2, 300]])
    run = jax.jit(lambda mask: forward(params, tokens, tiny, mask))
    assert np.isfinite(run(jnp.array([1.0, 1.0, 0.0, 1.0]))).all()
    assert np.isnan(run(jnp.array([1.0, 1.0, 1.0, 1.0]))).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers must be an integer of at least 1, got 0"),
        ({"num_layers": 12.0}, r"num_layers must be an integer of at least 1, got 12\.0"),
        ({"num_layers": True}, "num_layers must be an integer of at least 1, got True"),
        ({"max_rate": -0.1}, r"max_rate must be a number in \[0, 1\], got -0\.1"),
        ({"max_rate": 1.5}, r"max_rate must be a number in \[0, 1\], got 1\.5"),
        ({"max_rate": float("nan")}, "max_rate must be a number"),
        ({"max_rate": "0.1"}, "max_rate must be a number in .*, got '0.1'"),
        ({"max_rate": np.full(12, 0.1)}, r"max_rate must be a number in .*, got float64\[12\]"),
        ({"step": -1}, r"step must be an integer in 0\.\.99, got -1"),
        ({"step": 100}, r"step must be an integer in 0\.\.99, got 100"),
        ({"step": jnp.int32(100)}, r"step must be an integer in 0\.\.99, got 100 \(int32\)"),
        ({"step": 3.0}, "step must be an integer"),
        ({"step": False}, "step must be an integer"),
        ({"step": jnp.arange(3)}, r"step must be an integer in 0\.\.99, got int32\[3\]"),
        ({"total_steps": 0}, "total_steps must be an integer of at least 1, got 0"),
        ({"total_steps": None}, "total_steps must be an integer of at least 1, got None"),
        ({"depth_schedule": "quadratic"}, "depth_schedule is 'quadratic'; choose one of exponential, linear, uniform"),
        ({"time_schedule": "linear"}, "time_schedule is 'linear'; choose one of constant, exponential, linear_decay"),
        ({"time_schedule": 1}, "time_schedule is 1; choose one of constant"),
    ],
    ids=str,
)
def test_bad_arguments_are_named_in_one_line(change, message):
    good = {"num_layers": 12, "max_rate": 0.2, "step": 3, "total_steps": 100}
    with pytest.raises(UserError, match=message) as caught:
        layer_dropout_rates(**good | change)
    assert "\n" not in str(caught.value)


def test_a_traced_step_beyond_the_run_is_not_refused():
    rates = jax.jit(lambda step: layer_dropout_rates(12, 0.2, step, 100, "linear", "constant"))
    np.testing.assert_allclose(rates(100), layer_dropout_rates(12, 0.2, 99, 100, "linear", "constant"), rtol=1e-6)
    assert "callback" not in str(jax.make_jaxpr(rates)(100))
