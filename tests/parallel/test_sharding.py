"""The layout of everything large over a mesh of 2 x 2 x 2 devices, spelled out, and what may travel between devices."""

import math

import jax
import pytest

from lsjax.aot import hlo
from lsjax.aot.collectives import collectives
from lsjax.config import MeshConfig
from lsjax.errors import UserError
from lsjax.evaluation.exits import evaluate_batch
from lsjax.parallel.sharding import batch_sharding, check_batch, make_mesh
from lsjax.training.step import init_state, make_train_step, mean_gradients, recipe_at, state_shardings
from tests.helpers.runs import make_batch, replace

# Mesh axes of every parameter, its gradient and its two moments. Norm scales are whole, because they are small.
GOLDEN = {
    "embed": ("tensor", "fsdp"),
    "lm_head": ("fsdp", "tensor"),
    "final_norm/scale": (None,),
    "layers/attention_norm/scale": (None, None),
    "layers/feed_forward_norm/scale": (None, None),
    "layers/attention/qkv": (None, "fsdp", "tensor", None, None),
    "layers/attention/output": (None, "tensor", None, None, "fsdp"),
    "layers/feed_forward/gate_up": (None, "fsdp", None, "tensor"),
    "layers/feed_forward/down": (None, "tensor", "fsdp"),
}
SIZES = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(2, 2, 2))


@pytest.fixture
def run(tiny_run):
    """A run with an untied head, and enough tokens that a batch of states is larger than any weight."""
    import dataclasses

    config = dataclasses.replace(tiny_run, model=dataclasses.replace(tiny_run.model, tie_embeddings=False))
    return replace(config, training={"batch_size": 64, "sequence_length": 64, "loss_chunk": 32})


def specs(tree) -> dict[str, tuple]:
    """Returns {path: mesh axes, with None for each whole axis} of the arrays in a tree."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
        spec = tuple(leaf.sharding.spec)
        found["/".join(keys)] = spec + (None,) * (leaf.ndim - len(spec))
    return found


def shape_expected(shape, axes):
    return tuple(size // SIZES.get(axis, 1) for size, axis in zip(shape, axes, strict=True))


def test_parameters_and_moments(run, mesh):
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: init_state(run), out_shardings=state_shardings(run, mesh))()
    assert specs(state.params) == GOLDEN
    moments = {name: spec for name, spec in specs(state.optimizer).items() if spec}
    for moment in ("mu", "nu"):
        of_moment = {name.split(f"/{moment}/")[1]: spec for name, spec in moments.items() if f"/{moment}/" in name}
        assert of_moment == GOLDEN
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        name = "/".join(key.key for key in path)
        assert leaf.addressable_shards[0].data.shape == shape_expected(leaf.shape, GOLDEN[name])
    whole = [leaf for leaf in jax.tree.leaves(state) if leaf.sharding.is_fully_replicated]
    assert sum(leaf.nbytes for leaf in whole) < 0.05 * sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def test_after_a_step_everything_lies_as_before(run, mesh):
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: init_state(run), out_shardings=state_shardings(run, mesh))()
        before = jax.tree.map(lambda a: a.sharding, state)
        state, metrics = make_train_step(run, mesh)(state, make_batch(run))
    for old, leaf in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
        assert leaf.sharding.is_equivalent_to(old, leaf.ndim)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(metrics))


def test_gradients(run, mesh):
    with jax.set_mesh(mesh):
        shardings = state_shardings(run, mesh)
        state = jax.jit(lambda: init_state(run), out_shardings=shardings)()
        gradient_of = jax.jit(lambda s, b: mean_gradients(s, b, recipe_at(0, run), run, None, shardings.params)[0])
        assert specs(gradient_of(state, jax.device_put(make_batch(run), batch_sharding(mesh)))) == GOLDEN


@pytest.mark.parametrize(
    "recipe",
    [{}, {"exit_distillation": 1.0}, {"dropout_granularity": "batch"}, {"dropout_granularity": "subset"}],
    ids=str,
)
@pytest.mark.parametrize(("sizes", "rematerialize"), [((2, 2, 2), "elementwise"), ((1, 8, 1), "layer")], ids=str)
def test_no_activation_travels_in_a_training_step(run, sizes, recipe, rematerialize):
    """Checks that weights are gathered and gradients reduced, while states and logits stay with their sequences.

    The only activations that travel are the sums over `tensor`: at most one device's rows of width D per product.
    """
    config = replace(run, layerskip=recipe, training={"rematerialize": rematerialize})
    mesh, ways, tensor = make_mesh(MeshConfig(*sizes)), sizes[0] * sizes[1], sizes[2]
    with jax.set_mesh(mesh):
        state = jax.eval_shape(lambda: init_state(config))
        compiled = make_train_step(config, mesh).lower(state, make_batch(config)).compile()
    weights = [leaf for leaf in jax.tree.leaves(state.params) if leaf.ndim > 1]
    one_layer = max(math.prod(leaf.shape[1:] if leaf.ndim > 2 else leaf.shape) for leaf in weights) * 4
    rows = config.training.batch_size // ways * config.training.sequence_length * config.model.width * 4
    assert rows > one_layer  # else this test could not tell them apart
    found = collectives(hlo.parse(compiled.as_text()), 8)
    assert {c.kind for c in found} >= {"all-gather", "all-reduce"}
    for c in found:
        over_batch = len({device // tensor for device in c.group}) > 1
        assert c.payload <= (one_layer if over_batch and c.kind == "all-gather" else rows), c


def test_pieces_of_a_subset_share_the_weights_that_are_gathered(run):
    """Checks that pieces gather no more weights, and sum no more gradients, than when all rows run at once."""
    mesh, sent = make_mesh(MeshConfig(1, 8, 1)), {}
    for granularity in ("sample", "subset"):
        config = replace(run, layerskip={"dropout_granularity": granularity, "dropout_max_rate": 0.5})
        with jax.set_mesh(mesh):
            state = jax.eval_shape(lambda: init_state(run))
            compiled = make_train_step(config, mesh).lower(state, make_batch(run)).compile()
        found = collectives(hlo.parse(compiled.as_text()), 8)
        sent[granularity] = total_payload(found, "all-gather"), total_payload(found, "all-reduce", "reduce-scatter")
    assert sent["subset"][0] == sent["sample"][0]
    assert sent["subset"][1] < 1.01 * sent["sample"][1]


def total_payload(found, *kinds):
    return sum(c.times * c.payload for c in found if c.kind in kinds)


def test_evaluation_gathers_no_activation(run, mesh):
    with jax.set_mesh(mesh):
        params = jax.jit(lambda: init_state(run).params, out_shardings=state_shardings(run, mesh).params)()
        batch = jax.device_put(make_batch(run), batch_sharding(mesh))
        compiled = evaluate_batch.lower(params, batch, run.model, (2, 4)).compile()
    rows = run.training.batch_size // 4 * run.training.sequence_length * run.model.width * 4
    assert max(c.payload for c in collectives(hlo.parse(compiled.as_text()), 8)) <= rows


def test_a_mesh_that_does_not_fit_is_named(mesh):
    with pytest.raises(UserError, match=r"config.mesh \(data=3, fsdp=1, tensor=1\) does not fit 8"):
        make_mesh(MeshConfig(3, 1, 1))
    with pytest.raises(UserError, match=r"config.training.batch_size is 6 sequences, .* data x fsdp = 4"):
        check_batch(6, mesh, "config.training.batch_size")
    assert dict(mesh.shape) == SIZES


def test_groups_that_do_not_divide_are_named(tiny_run, mesh):
    """Puts 8 sequences on data x fsdp = 4 devices, 2 per device, which 4 groups do not divide."""
    config = replace(tiny_run, layerskip={"dropout_granularity": "subset", "dropout_groups": 4})
    with pytest.raises(UserError, match=r"config.layerskip.dropout_groups \(4\) must divide the 2 sequence"):
        make_train_step(config, mesh)
    make_train_step(
        replace(config, layerskip={"dropout_max_rate": 0.0}), mesh
    )  # without dropout the groups do not matter
