"""One training step: schedules as arrays, accumulation, compilation, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lsjax.config import Config, MeshConfig
from lsjax.errors import UserError
from lsjax.model.transformer import exit_logits, hidden_states
from lsjax.parallel.sharding import make_mesh
from lsjax.training import step as step_module
from lsjax.training.optimizer import learning_rate_schedule, make_optimizer
from lsjax.training.step import init_state, make_train_step, recipe_at, state_shardings, train_step
from tests.conftest import weight_products
from tests.helpers.runs import make_batch, replace


def run_steps(config, mesh_config, steps=3, devices=None):
    mesh = make_mesh(mesh_config, devices)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: init_state(config), out_shardings=state_shardings(config, mesh))()
        step = make_train_step(config, mesh)
        metrics = []
        for index in range(steps):
            state, m = step(state, make_batch(config, index))
            metrics.append(jax.device_get(m))
    return state, metrics, step


def test_steps_compile_once_while_every_schedule_moves(tiny_run):
    recipe = {"dropout_time_schedule": "exponential", "exit_curriculum": "gradual", "exit_distillation": 1.0}
    config = replace(tiny_run, layerskip=recipe | {"exit_distillation_schedule": "linear"})
    _, metrics, step = run_steps(config, MeshConfig(), steps=8)
    assert step._cache_size() == 1
    assert len({tuple(m.exit_active.tolist()) for m in metrics}) > 2
    assert len({float(m.layer_dropout_rate) for m in metrics}) == 8


def test_a_step_is_adamw_on_the_mean_loss(tiny_run):
    """Without dropout: parameters after a step equal clipped AdamW by hand, from the gradient of the plain loss."""
    config = replace(tiny_run, layerskip={"dropout_max_rate": 0.0, "exit_curriculum": "none"})
    state = init_state(config)
    batch = make_batch(config)

    def mean_loss(params):
        from lsjax.model.transformer import forward

        log_probabilities = jax.nn.log_softmax(forward(params, batch.tokens, config.model))
        picked = jnp.take_along_axis(log_probabilities, batch.targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(picked * batch.weights) / jnp.sum(batch.weights)

    loss, gradient = jax.jit(jax.value_and_grad(mean_loss))(state.params)
    after, metrics = jax.jit(functools.partial(train_step, config=config))(state, batch)
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics.gradient_norm, norm, rtol=1e-4)
    t = config.training
    rate = t.learning_rate / t.warmup_steps  # the first of two warm-up steps
    assert float(metrics.learning_rate) == pytest.approx(rate)
    clipped = gradient["layers"]["feed_forward"]["down"] * min(1.0, t.gradient_clip / norm)
    old = state.params["layers"]["feed_forward"]["down"]
    expected = old - rate * (clipped / (jnp.abs(clipped) + 1e-8) + t.weight_decay * old)  # Adam's first step
    np.testing.assert_allclose(after.params["layers"]["feed_forward"]["down"], expected, rtol=1e-4, atol=1e-5)


def test_the_learning_rate_warms_up_and_decays(tiny_run):
    config = replace(tiny_run, training={"total_steps": 100, "warmup_steps": 10, "learning_rate": 2.0}).training
    schedule = learning_rate_schedule(config)
    half = 10 + 45
    cosine = 0.2 + (2.0 - 0.2) * 0.5 * (1 + np.cos(np.pi * (half - 10) / 90))
    np.testing.assert_allclose([schedule(s) for s in (0, 5, 10, half, 100)], [0, 1, 2, cosine, 0.2], rtol=1e-5)


def test_norm_scales_are_not_decayed(tiny_run):
    params = init_state(tiny_run).params
    optimizer = make_optimizer(tiny_run.training)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert optax.tree.norm([updates["final_norm"], updates["layers"]["attention_norm"]]) == 0
    assert optax.tree.norm(updates["embed"]) > 0


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_gives_the_gradient_of_the_whole_batch(tiny_run, parts):
    config = replace(tiny_run, layerskip={"dropout_max_rate": 0.0})
    state, batch = init_state(config), make_batch(config)
    step = jax.jit(train_step, static_argnames="config")
    whole, metrics = step(state, batch, config=config)
    split, split_metrics = step(state, batch, config=replace(config, training={"gradient_accumulation": parts}))
    np.testing.assert_allclose(split_metrics.loss, metrics.loss, rtol=1e-5)
    np.testing.assert_allclose(split_metrics.exit_losses, metrics.exit_losses, rtol=1e-5)
    np.testing.assert_allclose(split_metrics.gradient_norm, metrics.gradient_norm, rtol=1e-4)
    # Adam's first moment is linear in the gradient: equal moments mean equal gradients, leaf by leaf.
    for ours, theirs in zip(jax.tree.leaves(split.optimizer), jax.tree.leaves(whole.optimizer), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-7)


def test_masks_differ_from_step_to_step_and_repeat_for_the_same_step(tiny_run):
    config = replace(tiny_run, layerskip={"dropout_max_rate": 0.9, "dropout_depth_schedule": "uniform"})
    state, batch = init_state(config), make_batch(config)
    step = jax.jit(lambda s: train_step(s, batch, config=config)[1].loss)
    later = state._replace(step=jnp.int32(3))
    assert step(state) == step(state)
    assert step(state) != step(later)


def test_the_recipe_is_that_of_the_step(tiny_run):
    recipe = recipe_at(4, tiny_run)
    assert recipe.exit_active.tolist() == [False, True, False, True]  # 4 mod 3 = 1, and the last
    np.testing.assert_allclose(recipe.exit_weights, [0, 0.2 / (0.2 + 3.6), 0, 3.6 / (0.2 + 3.6)], rtol=1e-5)


@pytest.mark.parametrize(("curriculum", "on"), [("none", [1, 3]), ("all", [0, 1, 2, 3])])
def test_a_draft_exit_alone_learns_from_the_last_layer_more_and_more(tiny_run, curriculum, on):
    """The share is nothing at step 0 and whole at the last step, from the same parameters."""
    recipe = {"exit_curriculum": curriculum, "draft_exit": 2, "exit_distillation": 5.0, "dropout_max_rate": 0.0}
    config = replace(tiny_run, layerskip=recipe | {"exit_distillation_schedule": "linear"}, training={"total_steps": 9})
    state, batch = init_state(config), make_batch(config)
    state = state._replace(params=jax.tree.map(lambda a: 10 * a, state.params))  # fresh ones: all exits say the same

    @functools.partial(jax.jit, static_argnames="config")
    def run(step, config):
        metrics = train_step(state._replace(step=step), batch, config=config)[1]
        return metrics.loss, metrics.exit_losses

    untaught, losses = run(0, replace(config, layerskip={"exit_distillation": 0.0}))
    first, middle, last = (run(step, config)[0] for step in (0, 4, 8))
    assert np.flatnonzero(losses).tolist() == on
    np.testing.assert_allclose(first, untaught, rtol=1e-6)
    gain = last - first
    assert gain > 1e-3
    np.testing.assert_allclose(middle - first, gain / 2, rtol=1e-3)
    # The divergence of that exit alone, whichever others are on: the same in both cases, a weight apart.
    np.testing.assert_allclose(
        gain / recipe_at(8, config).exit_weights[1], 5 * divergence(state, batch, config), rtol=1e-3
    )


def divergence(state, batch, config, exit_layer=2):
    """KL(last || exit), nats a learned token."""
    states = hidden_states(state.params, batch.tokens, config.model)
    log_p = jax.nn.log_softmax(exit_logits(state.params, states, config.model))
    of_token = jnp.sum(jnp.exp(log_p[-1]) * (log_p[-1] - log_p[exit_layer - 1]), axis=-1)
    return jnp.sum(of_token * batch.weights) / jnp.sum(batch.weights)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"draft_exit": -1}, "draft_exit .* below config.model.num_layers .4"),
        ({"draft_exit": 4}, "draft_exit .* below config.model.num_layers .4"),
        ({"draft_exit": 1}, "draft_exit .1. weighs nothing: set exit_weight_floor"),
        ({"draft_exit": 2, "exit_scale": 0.0}, "draft_exit .2. weighs nothing"),
        ({"exit_distillation": 1.0, "exit_curriculum": "none"}, "no early exit is trained"),
    ],
)
def test_what_a_draft_exit_cannot_be(tiny_run, recipe, said):
    with pytest.raises(UserError, match=said):
        Config.from_dict(replace(tiny_run, layerskip=recipe).to_dict())


@functools.cache
def single_device(config):
    return run_steps(config, MeshConfig(1, 1, 1), devices=jax.devices()[:1])[1]


MESHES = [MeshConfig(8, 1, 1), MeshConfig(1, 8, 1), MeshConfig(2, 2, 2), MeshConfig(1, 4, 2), MeshConfig(4, 1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "granularity"),
    [*((mesh, "sample") for mesh in MESHES), (MESHES[1], "batch"), (MESHES[2], "batch")],
    ids=str,
)
def test_any_mesh_gives_the_losses_of_one_device(tiny_run, mesh, granularity):
    config = replace(tiny_run, layerskip={"dropout_max_rate": 0.5, "dropout_granularity": granularity})
    single, (_, sharded, _) = single_device(config), run_steps(config, mesh)
    for ours, theirs in zip(sharded, single, strict=True):
        np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-5)
        np.testing.assert_allclose(ours.exit_losses, theirs.exit_losses, rtol=1e-5)
        np.testing.assert_allclose(ours.gradient_norm, theirs.gradient_norm, rtol=1e-4)


@pytest.mark.parametrize("mesh", [MeshConfig(1, 1, 1), MeshConfig(2, 2, 2)], ids=str)
@pytest.mark.parametrize("granularity", ["batch", "subset"])
def test_on_a_cpu_bfloat16_is_that_of_products(tiny_run, mesh, granularity):
    """Every product with weights, forward and backward, multiplies bfloat16 and adds float32, and none does unasked."""
    recipe = {"dropout_granularity": granularity, "dropout_groups": 1, "dropout_max_rate": 0.5}
    config = replace(tiny_run, layerskip=recipe, training={"gradient_accumulation": 2, "batch_size": 16})
    for dtype in ("bfloat16", "float32"):
        products = weight_products(traced_step(replace(config, training={"compute_dtype": dtype}), mesh))
        assert len(products) > 12
        assert {v.aval.dtype.name for eqn in products for v in eqn.invars} == {dtype}
        assert {eqn.outvars[0].aval.dtype.name for eqn in products} == {"float32"}


def traced_step(config, mesh_config):
    mesh = make_mesh(mesh_config, jax.devices()[: mesh_config.data * mesh_config.fsdp * mesh_config.tensor])
    with jax.set_mesh(mesh), jax.default_matmul_precision("bfloat16"):  # which is not ours, and changes nothing
        return make_train_step(config, mesh).trace(jax.eval_shape(lambda: init_state(config)), make_batch(config)).jaxpr


def test_a_bfloat16_step_is_near_the_exact_one(tiny_run):
    exact, near = (
        jax.jit(functools.partial(train_step, config=replace(tiny_run, training={"compute_dtype": dtype})))(
            init_state(tiny_run), make_batch(tiny_run)
        )[0].optimizer
        for dtype in ("float32", "bfloat16")
    )
    for ours, theirs in zip(jax.tree.leaves(near), jax.tree.leaves(exact), strict=True):
        if ours.ndim > 1:  # moments of matrices
            assert 0 < np.linalg.norm(ours - theirs) < 0.02 * np.linalg.norm(theirs)


@pytest.mark.slow
def test_a_step_on_a_subset_is_that_of_its_mask(tiny_run, monkeypatch):
    """On several devices and by microbatches, against the same rows masked."""
    recipe = {"dropout_max_rate": 0.6, "dropout_granularity": "subset", "dropout_groups": 2}
    config = replace(tiny_run, layerskip=recipe, training={"batch_size": 16, "gradient_accumulation": 2})
    mesh = MeshConfig(2, 2, 2)
    _, gathered, _ = run_steps(config, mesh)
    monkeypatch.setattr(step_module, "_pieces", lambda config: None)
    _, masked, _ = run_steps(config, mesh)
    for ours, theirs in zip(gathered, masked, strict=True):
        np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-5)
        np.testing.assert_allclose(ours.gradient_norm, theirs.gradient_norm, rtol=1e-4)


def test_the_state_is_split_and_donated(tiny_run):
    mesh = make_mesh(MeshConfig(1, 4, 2))
    with jax.set_mesh(mesh):
        shardings = state_shardings(tiny_run, mesh)
        state = jax.jit(lambda: init_state(tiny_run), out_shardings=shardings)()
        compiled = make_train_step(tiny_run, mesh).lower(state, make_batch(tiny_run)).compile()
    per_device = sum(shard.data.nbytes for a in jax.tree.leaves(state) for shard in a.addressable_shards[:1])
    matrices = [a for a in jax.tree.leaves(state) if a.ndim > 1 and a.shape[-1] > 1 and a.shape != (4, 32)]
    assert all(a.sharding.num_devices == 8 and a.addressable_shards[0].data.size == a.size // 8 for a in matrices)
    assert compiled.memory_analysis().alias_size_in_bytes >= per_device


def test_frozen_parameters_stay_and_have_no_moments(tiny_run):
    config = replace(tiny_run, training={"frozen": "embed, layers/attention", "weight_decay": 0.5})
    before = jax.device_get(run_steps(config, MeshConfig(fsdp=2, tensor=2), steps=0)[0].params)
    state, _, _ = run_steps(config, MeshConfig(fsdp=2, tensor=2), steps=2)
    moved = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != b)), state.params, before)
    assert not moved["embed"]
    assert not any(jax.tree.leaves(moved["layers"]["attention"]))
    assert all(jax.tree.leaves(moved["layers"]["feed_forward"]))
    assert moved["final_norm"]["scale"]
    moments = [leaf.shape for leaf in jax.tree.leaves(state.optimizer)]
    assert before["embed"].shape not in moments
    assert moments.count(before["layers"]["feed_forward"]["down"].shape) == 2
    for frozen, message in (("embedd", "'embedd' is no parameter"), ("embed,layers,final_norm", "nothing to train")):
        with pytest.raises(UserError, match=message):
            init_state(replace(config, training={"frozen": frozen}))


def test_only_exits_from_the_first_to_the_last_are_trained(tiny_run):
    config = replace(tiny_run, layerskip={"exit_first": 3, "exit_curriculum": "all"})
    assert recipe_at(0, config).exit_active.tolist() == [False, False, True, True]
    config = replace(tiny_run, layerskip={"exit_first": 3, "exit_rotation": 4})
    assert [recipe_at(t, config).exit_active.tolist().index(True) for t in range(4)] == [3, 3, 2, 3]
    config = replace(tiny_run, layerskip={"exit_last": 2, "exit_curriculum": "all"})
    assert recipe_at(0, config).exit_active.tolist() == [True, True, False, True]
    with pytest.raises(UserError, match="exit_last"):
        Config.from_dict(replace(tiny_run, layerskip={"exit_first": 3, "exit_last": 2}).to_dict())
