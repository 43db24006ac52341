"""Exit weights and curricula against the paper's definitions, written out in plain Python."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.config import LayerSkipConfig
from lsjax.layerskip.exits import active_exits, exit_curriculum, exit_distillation, exit_weights


def paper_weights(num_layers, scale, active):
    e = [scale * sum(range(l + 1)) for l in range(num_layers - 1)]
    e.append((num_layers - 1) + scale * sum(range(num_layers - 1)))
    kept = [w if on else 0.0 for w, on in zip(e, active, strict=True)]
    return [w / sum(kept) for w in kept]


@pytest.mark.parametrize("num_layers", [2, 3, 16, 32])
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0])
def test_weights_are_equation_6(num_layers, scale):
    for seed in range(4):
        active = np.random.default_rng(seed).random(num_layers) < 0.5
        active[-1] = True
        weights = exit_weights(num_layers, scale, jnp.asarray(active))
        np.testing.assert_allclose(weights, paper_weights(num_layers, scale, active), rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-6)


def test_last_layer_share_with_all_exits_on():
    """The paper's e(l) for 32 layers and e_scale 0.2 gives the last layer 11.1 %."""
    np.testing.assert_allclose(exit_weights(32, 0.2, jnp.ones(32, bool))[-1], 0.111, atol=5e-4)


def test_the_floor_lifts_small_exits_and_nothing_else():
    active = jnp.array([True, True, False, True, True])
    # e = [0, 1, 3, 6, 4 + 6] at e_scale 1; a floor of 0.25 lifts the first two to 2.5.
    np.testing.assert_allclose(exit_weights(5, 1.0, active, floor=0.25), np.array([2.5, 2.5, 0, 6, 10]) / 21, rtol=1e-6)


def test_the_draft_exit_is_on_at_every_step():
    exits = LayerSkipConfig(exit_rotation=3, exit_first=4, exit_last=5, draft_exit=2)
    on = [np.flatnonzero(active_exits(exits, 6, step, 100)) + 1 for step in range(3)]
    assert [list(layers) for layers in on] == [[2, 4, 6], [2, 5, 6], [2, 6]]
    alone = active_exits(dataclasses.replace(exits, exit_curriculum="none"), 6, 0, 100)
    assert (np.flatnonzero(alone) + 1).tolist() == [2, 6]


@pytest.mark.parametrize(("draft_exit", "learn"), [(0, [1, 1, 1, 0]), (2, [0, 1, 0, 0])])
def test_who_learns_from_the_last_layer_and_how_much(draft_exit, learn):
    exits = LayerSkipConfig(exit_distillation=8.0, draft_exit=draft_exit)
    assert exit_distillation(exits, 4, 7, 401).tolist() == [8.0 * share for share in learn]
    growing = dataclasses.replace(exits, exit_distillation_schedule="linear")
    for step, growth in ((0, 0.0), (100, 0.25), (400, 1.0)):
        np.testing.assert_allclose(exit_distillation(growing, 4, step, 401), 8.0 * growth * np.array(learn))


def test_one_layer_has_all_the_weight():
    assert exit_weights(1, 0.5, jnp.ones(1, bool)).tolist() == [1.0]


@pytest.mark.parametrize(("num_layers", "rotation"), [(12, 4), (32, 8), (32, 31), (7, 3)])
def test_rotational_enables_each_exit_once_in_r_steps(num_layers, rotation):
    for step in range(2 * rotation):
        active = exit_curriculum("rotational", num_layers, step, 1000, rotation)
        expected = [l % rotation == step % rotation or l == num_layers - 1 for l in range(num_layers)]
        assert active.tolist() == expected


@pytest.mark.parametrize(("num_layers", "total"), [(12, 1000), (32, 50_000), (5, 7), (4, 3), (24, 5_800)])
def test_gradual_enables_from_the_last_layer_down(num_layers, total):
    for step in sorted({0, 1, 2, total // 64, total // 3, total // 2 - 1, total // 2, total - 1}):
        active = exit_curriculum("gradual", num_layers, step, total)
        count = min(num_layers, 1 + int(Fraction(2 * num_layers * step, total)))
        assert active.tolist() == [l >= num_layers - count for l in range(num_layers)], step


def test_gradual_does_not_overflow_on_a_long_run():
    total = 2_000_000_000
    active = exit_curriculum("gradual", 80, total // 4, total)
    assert int(active.sum()) == 41


def test_all_and_none():
    assert exit_curriculum("all", 5, 3, 10).all()
    assert exit_curriculum("none", 5, 3, 10).tolist() == [False] * 4 + [True]


@pytest.mark.parametrize("name", ["rotational", "gradual", "all", "none"])
def test_a_traced_step_gives_the_same_and_compiles_once(name):
    curriculum = jax.jit(lambda step: exit_curriculum(name, 12, step, 100, 4))
    for step in range(0, 100, 7):
        assert curriculum(step).tolist() == exit_curriculum(name, 12, step, 100, 4).tolist()
    assert curriculum._cache_size() == 1
