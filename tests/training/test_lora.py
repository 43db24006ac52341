"""Training steps with LoRA: what is trained and what stays, gradients, meshes, and bytes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.benchmarks.training import benchmark_training
from lsjax.config import MeshConfig
from lsjax.errors import UserError
from lsjax.evaluation.exits import exit_profile
from lsjax.model.lora import merge
from lsjax.parallel.sharding import make_mesh, tree_shardings
from lsjax.training.step import (
    init_state,
    make_train_step,
    mean_gradients,
    model_params,
    recipe_at,
    state_shardings,
    train_step,
)
from tests.helpers.runs import make_batch, replace
from tests.model.test_lora import random_adapter

ALL = "embed,lm_head,layers"


@pytest.fixture
def lora_run(tiny_run):
    """Returns a configuration with adapters of all matrices of an untied model."""
    config = dataclasses.replace(tiny_run, model=dataclasses.replace(tiny_run.model, tie_embeddings=False))
    return replace(config, training={"lora_rank": 3, "lora_targets": ALL, "learning_rate": 0.01})


def run_steps(config, mesh_config, steps=3, batches=10):
    """Returns the state, metrics and program of some steps; the batches are repeated after `batches` of them."""
    mesh = make_mesh(mesh_config, jax.devices()[: mesh_config.data * mesh_config.fsdp * mesh_config.tensor])
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: init_state(config), out_shardings=state_shardings(config, mesh))()
        step, metrics = make_train_step(config, mesh), []
        for index in range(steps):
            state, m = step(state, make_batch(config, index % batches))
            metrics.append(jax.device_get(m))
    return state, metrics, step


ONE = MeshConfig(1, 1, 1)


def test_adapters_move_and_the_base_stays(lora_run):
    config = replace(lora_run, training={"gradient_accumulation": 2, "weight_decay": 0.5})
    before = jax.device_get(run_steps(config, ONE, steps=0)[0])
    state, metrics, step = run_steps(config, ONE, steps=4, batches=1)
    assert step._cache_size() == 1
    assert metrics[3].exit_losses[-1] < metrics[0].exit_losses[-1] - 0.01
    jax.tree.map(np.testing.assert_array_equal, state.base, before.base)
    moved = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != b)), state.params, before.params)
    assert all(jax.tree.leaves(moved))
    moments = sorted(a.shape for a in jax.tree.leaves(state.optimizer) if a.ndim)
    assert moments == sorted(2 * [a.shape for a in jax.tree.leaves(state.params)])


def test_the_first_losses_are_those_of_the_base(lora_run):
    """Takes the same seed without LoRA, whose parameters are then the same; only the compiler's fusions differ."""
    batch, full = make_batch(lora_run), replace(lora_run, training={"lora_rank": 0})
    adapted, plain = (
        jax.jit(functools.partial(train_step, config=config))(init_state(config), batch)[1]
        for config in (lora_run, full)
    )
    np.testing.assert_allclose(adapted.exit_losses, plain.exit_losses, rtol=5e-7)
    np.testing.assert_allclose(adapted.loss, plain.loss, rtol=5e-7)


@pytest.mark.parametrize(
    "granularity", ["sample", *(pytest.param(name, marks=pytest.mark.slow) for name in ("subset", "batch"))]
)
def test_gradients_are_those_of_the_merged_weights(lora_run, granularity):
    """The chain rule for W + s A B gives dA = s dW B^T and dB = s A^T dW; dW is that of training the weights."""
    recipe = {"dropout_max_rate": 0.5, "dropout_granularity": granularity, "exit_curriculum": "all"}
    parts = 1 if granularity == "sample" else 2
    config = replace(lora_run, layerskip=recipe, training={"gradient_accumulation": parts, "batch_size": 8 * parts})
    scale = config.training.lora_alpha / config.training.lora_rank
    state, batch = init_state(config), make_batch(config)
    targets = ("embed", "lm_head", *(f"layers/{m}" for m in ("attention/qkv", "attention/output")))
    targets += ("layers/feed_forward/gate_up", "layers/feed_forward/down")
    state = state._replace(params=jax.tree.map(lambda a: 0.1 * a, random_adapter(config.model, targets)))
    full = replace(config, training={"lora_rank": 0})

    @functools.partial(jax.jit, static_argnames="config")
    def gradient(state, config):
        return mean_gradients(state, batch, recipe_at(0, config), config)[0]

    ours = gradient(state, config)
    merged = merge(state.base, state.params, scale)
    dense = gradient(init_state(full)._replace(params=merged), full)
    for target in targets:
        factors, mine, dw = (
            functools.reduce(lambda t, k: t[k], target.split("/"), t) for t in (state.params, ours, dense)
        )
        inputs, stacked = 3 if target.endswith("output") else 1, target.startswith("layers")
        for layer in range(config.model.num_layers) if stacked else [...]:
            a, b, dw_ = (np.float64(array[layer]) for array in (factors["lora_a"], factors["lora_b"], dw))
            outputs = tuple(range(1, b.ndim))
            da = np.tensordot(dw_, b, (tuple(range(inputs, dw_.ndim)), outputs)) * scale
            db = np.tensordot(a, dw_, (tuple(range(inputs)),) * 2) * scale
            for found, expected in ((mine["lora_a"][layer], da), (mine["lora_b"][layer], db)):
                assert np.abs(expected).max() > 0
                np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_no_gradient_of_a_weight_is_computed_and_the_base_is_held_once(lora_run):
    """Looks for products of a weight's shape in the compiled step; the shapes here differ from all others."""
    shapes = {"32,64", "88,32", "32,176", "320,32", "32,320"}  # qkv, down, gate_up, and the head either way round
    config = dataclasses.replace(lora_run, model=dataclasses.replace(lora_run.model, feed_forward_width=88))
    mesh = make_mesh(ONE, jax.devices()[:1])
    for rank in (0, 3):
        config = replace(config, training={"lora_rank": rank, "lora_targets": "layers"})
        with jax.set_mesh(mesh):
            state = jax.eval_shape(lambda: init_state(config))  # noqa: B023
            compiled = make_train_step(config, mesh).lower(state, make_batch(config)).compile()
        found = set(re.findall(r"= \w+\[([\d,]*)\]\S* (?:dot|custom-call)\(", compiled.as_text()))
        assert bool(found & shapes) is (rank == 0), found & shapes
        assert compiled.memory_analysis().alias_size_in_bytes == bytes_of(state)  # all of it is donated


def test_bytes_of_a_state(lora_run):
    """A parameter costs 12 bytes when it is trained, and the size of the compute dtype when it is kept."""
    full = replace(lora_run, training={"lora_rank": 0})
    count = sum(a.size for a in jax.tree.leaves(jax.eval_shape(lambda: init_state(full)).params))
    rank, (L, D, F, V, qkv) = 3, (4, 32, 48, 320, 2 * 4 * 8)
    thin = rank * (2 * (V + D) + L * ((D + qkv) + (D + D) + (D + 2 * F) + (F + D)))
    counters = 8  # the step, and the optimizer's two
    assert bytes_of(init_state(full)) == 12 * count + counters + 4
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        config = replace(lora_run, training={"compute_dtype": dtype})
        execution = step_execution(dtype)
        state = jax.eval_shape(lambda: init_state(config, execution))  # noqa: B023
        assert bytes_of(state) == size * count + 12 * thin + counters + 4


def bytes_of(tree):
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def step_execution(dtype):
    from lsjax.model.execution import Execution
    from lsjax.model.flash import choose_attention

    return Execution(jnp.dtype(dtype), choose_attention("plain", "cpu", jnp.dtype(dtype), 8, 32))


@pytest.mark.parametrize("granularity", ["sample", pytest.param("subset", marks=pytest.mark.slow)])
def test_a_mesh_gives_the_losses_of_one_device(lora_run, granularity):
    recipe = {"dropout_max_rate": 0.5, "dropout_granularity": granularity, "dropout_groups": 2}
    if granularity == "subset":  # whose draws depend on the number of devices
        recipe["dropout_max_rate"] = 0.0
    config = replace(lora_run, layerskip=recipe, training={"batch_size": 16})
    single, sharded = run_steps(config, ONE), run_steps(config, MeshConfig(2, 2, 2))
    for ours, theirs in zip(sharded[1], single[1], strict=True):
        np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-5)
        np.testing.assert_allclose(ours.exit_losses, theirs.exit_losses, rtol=1e-5)
        np.testing.assert_allclose(ours.gradient_norm, theirs.gradient_norm, rtol=1e-4)
    specs = {
        "/".join(key.key for key in path): tuple(a.sharding.spec) + (None,) * (a.ndim - len(a.sharding.spec))
        for path, a in jax.tree_util.tree_leaves_with_path(sharded[0].params)
    }
    assert specs == {
        "embed/lora_a": ("tensor", None),
        "embed/lora_b": (None, "fsdp"),
        "lm_head/lora_a": ("fsdp", None),
        "lm_head/lora_b": (None, "tensor"),
        "layers/attention/qkv/lora_a": (None, "fsdp", None),
        "layers/attention/qkv/lora_b": (None, None, "tensor", None, None),
        "layers/attention/output/lora_a": (None, "tensor", None, None, None),
        "layers/attention/output/lora_b": (None, None, "fsdp"),
        "layers/feed_forward/gate_up/lora_a": (None, "fsdp", None),
        "layers/feed_forward/gate_up/lora_b": (None, None, None, "tensor"),
        "layers/feed_forward/down/lora_a": (None, "tensor", None),
        "layers/feed_forward/down/lora_b": (None, None, "fsdp"),
    }
    params = jax.eval_shape(lambda state: model_params(state, config), sharded[0])
    weight = tree_shardings(params, make_mesh(MeshConfig(2, 2, 2)))["layers"]["feed_forward"]["down"].weight
    assert tuple(weight.spec) == (None, "tensor", "fsdp")
    base = sharded[0].base["layers"]["feed_forward"]["down"]
    assert base.addressable_shards[0].data.size == base.size // 4


@pytest.mark.slow
def test_a_subset_on_a_mesh_is_that_of_its_mask(lora_run, monkeypatch):
    from lsjax.training import step as step_module

    recipe = {"dropout_max_rate": 0.6, "dropout_granularity": "subset", "dropout_groups": 2}
    config = replace(lora_run, layerskip=recipe, training={"batch_size": 16, "gradient_accumulation": 2})
    _, gathered, _ = run_steps(config, MeshConfig(2, 2, 2))
    monkeypatch.setattr(step_module, "_pieces", lambda config: None)
    _, masked, _ = run_steps(config, MeshConfig(2, 2, 2))
    for ours, theirs in zip(gathered, masked, strict=True):
        np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-5)
        np.testing.assert_allclose(ours.gradient_norm, theirs.gradient_norm, rtol=1e-4)


def test_evaluation_is_that_of_the_merged_model(lora_run):
    state, batch = run_steps(lora_run, ONE)[0], make_batch(lora_run, 9)
    merged = merge(state.base, state.params, lora_run.training.lora_alpha / 3)
    ours = exit_profile(model_params(state, lora_run), [batch], lora_run.model)
    np.testing.assert_allclose(ours.loss, exit_profile(merged, [batch], lora_run.model).loss, rtol=1e-5)


@pytest.mark.parametrize(
    ("targets", "frozen", "expected"),
    [
        ("layers", "", {"qkv", "output", "gate_up", "down"}),
        ("layers/attention, lm_head", "embed", {"qkv", "output", "lm_head"}),
        ("layers", "layers/attention,final_norm", {"gate_up", "down"}),
        ("layers/feed_forward/down", "", {"down"}),
    ],
)
def test_targets_are_the_matrices_named(lora_run, targets, frozen, expected):
    config = replace(lora_run, training={"lora_targets": targets, "frozen": frozen})
    params = jax.eval_shape(lambda: init_state(config)).params
    assert {path[-2].key for path, _ in jax.tree_util.tree_leaves_with_path(params)} == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora_targets": "layers/attention_norm"}, "'layers/attention_norm' is no matrix; the matrices are embed, "),
        ({"lora_targets": "q_proj"}, "lora_targets: 'q_proj' is no matrix"),
        ({"lora_targets": ""}, r"lora_targets \(''\) leaves nothing to train"),
        ({"lora_targets": "layers", "frozen": "layers"}, "leaves nothing to train"),
        ({"frozen": "embedd"}, "frozen: 'embedd' is no parameter"),
        ({"lora_rank": 33}, r"lora_rank \(33\) exceeds a side of embed \(320 x 32\)"),
    ],
)
def test_what_targets_cannot_be(lora_run, keys, message):
    with pytest.raises(UserError, match=message):
        init_state(replace(lora_run, training=keys))


@pytest.mark.slow
def test_the_step_is_timed_beside_the_one_that_trains_everything(lora_run):
    config = replace(lora_run, training={"lora_targets": "layers"})
    everything = replace(lora_run, training={"lora_rank": 0})
    report = benchmark_training(config, steps=1, warmup=1, variants={"full": everything})
    lora, full = report["runs"]
    assert [lora["name"], full["name"]] == ["lsjax", "full"]
    assert lora["losses"][0] == pytest.approx(full["losses"][0], rel=1e-5)
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(init_state(everything).params))
    assert full["memory"] > lora["memory"] + parameters  # at least Adam's two moments, less what LoRA adds
