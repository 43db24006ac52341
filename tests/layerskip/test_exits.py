"""Exit weights and curricula against the paper's definitions, written out in plain Python."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.config import LayerSkipConfig
from lsjax.errors import UserError
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
    """Checks that the paper's e(l) for 32 layers and e_scale 0.2 gives the last layer 11.1 %."""
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
def test_which_exits_learn_from_the_last_layer_and_how_much(draft_exit, learn):
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "cyclic"}, "name is 'cyclic'; choose one of rotational, gradual, all, none"),
        ({"name": None}, "name is None; choose one of rotational"),
        ({"num_layers": 0}, "num_layers must be an integer of at least 1, got 0"),
        ({"num_layers": 2.5}, "num_layers must be an integer"),
        ({"step": -1}, r"step must be an integer in 0\.\.99, got -1"),
        ({"step": 100}, r"step must be an integer in 0\.\.99, got 100"),
        ({"step": True}, "step must be an integer"),
        ({"total_steps": 0}, "total_steps must be an integer of at least 1, got 0"),
        ({"total_steps": 2**31}, "total_steps must be an integer of at least 1"),
        ({"rotation": 0}, "rotation must be an integer of at least 1, got 0"),
        ({"rotation": 1.5}, "rotation must be an integer"),
    ],
    ids=str,
)
def test_bad_arguments_of_a_curriculum_are_named_in_one_line(change, message):
    good = {"name": "gradual", "num_layers": 12, "step": 3, "total_steps": 100, "rotation": 4}
    with pytest.raises(UserError, match=message) as caught:
        exit_curriculum(**good | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers must be an integer of at least 1, got 0"),
        ({"exit_scale": -1.0}, r"exit_scale must be a number in \[0, 1\], got -1\.0"),
        ({"exit_scale": float("inf")}, "exit_scale must be a number"),
        ({"floor": 2}, r"floor must be a number in \[0, 1\], got 2"),
        ({"active": np.ones(3, bool)}, r"active must have an entry for each of 4 layers, got bool\[3\]"),
        ({"active": True}, "active must have an entry for each of 4 layers, got True"),
        ({"active": [[True], [True, False]]}, "active must be an array with rows of equal length"),
        ({"active": [1, 2, 3, 4]}, r"active must be True or False for each layer, got \[1, 2, 3, 4\]"),
        ({"active": ["a", "b", "c", "d"]}, "active must be True or False"),
        ({"active": np.zeros(4, bool)}, "active: the exits that are on weigh nothing; turn on the last layer"),
        ({"active": [True, False, False, False]}, "active: the exits that are on weigh nothing"),
        ({"active": [False, True, False, False], "exit_scale": 0.0}, "active: the exits that are on weigh nothing"),
    ],
    ids=str,
)
def test_bad_arguments_of_exit_weights_are_named_in_one_line(change, message):
    good = {"num_layers": 4, "exit_scale": 0.5, "active": np.ones(4, bool)}
    with pytest.raises(UserError, match=message) as caught:
        exit_weights(**good | change)
    assert "\n" not in str(caught.value)


def test_active_exits_may_be_a_list_or_zeros_and_ones():
    expected = exit_weights(4, 0.5, np.array([True, False, True, True]))
    for active in ([True, False, True, True], [1, 0, 1, 1], jnp.array([1.0, 0.0, 1.0, 1.0])):
        np.testing.assert_array_equal(exit_weights(4, 0.5, active), expected)


def test_traced_arguments_are_not_checked():
    """No value is read: a step beyond the run and flags that are all off pass, and the programs call no host."""
    curriculum = jax.jit(lambda step: exit_curriculum("rotational", 12, step, 100, 4))
    assert curriculum(101).tolist() == exit_curriculum("rotational", 12, 1, 100, 4).tolist()
    weights = jax.jit(lambda active: exit_weights(4, 0.5, active))
    assert np.isnan(weights(np.zeros(4, bool))).all()
    assert "callback" not in str(jax.make_jaxpr(curriculum)(3)) + str(jax.make_jaxpr(weights)(np.ones(4, bool)))


def test_a_rotation_longer_than_the_run_is_averaged_over_the_rotation():
    """Costs are averaged over a whole rotation, whose later steps lie beyond a short run."""
    exits = LayerSkipConfig(exit_curriculum="rotational", exit_rotation=8)
    assert active_exits(exits, 12, 7, 5).tolist() == [l % 8 == 7 or l == 11 for l in range(12)]
