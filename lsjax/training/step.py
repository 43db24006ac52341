"""One training step, and one evaluation step: pure functions of arrays, jitted once."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lsjax.config import Config, LayerSkipConfig
from lsjax.data.batch import Batch
from lsjax.errors import UserError
from lsjax.layerskip.dropout import draw_layer_mask, layer_dropout_rates, subset_pieces
from lsjax.layerskip.exits import active_exits, exit_distillation, exit_weights
from lsjax.layerskip.loss import multi_exit_loss
from lsjax.model.execution import COMPILER_OPTIONS, Execution, choose_execution
from lsjax.model.matmul import rounding_products
from lsjax.model.transformer import Params, head_matrix, init_params
from lsjax.scale.sharding import batch_sharding, batch_ways, check_batch, tree_shardings
from lsjax.training.optimizer import is_frozen, learning_rate_schedule, make_optimizer


class TrainState(NamedTuple):
    """`step` counts finished steps: the next one to run is step number `step` (t of the equations)."""

    step: jax.Array
    params: Params
    optimizer: optax.OptState


class StepMetrics(NamedTuple):
    """Device arrays of one step. `loss` is J (Eq. 5) a token; `exit_losses` [L] is 0 where `exit_active` is not."""

    loss: jax.Array
    exit_losses: jax.Array
    exit_active: jax.Array
    gradient_norm: jax.Array
    learning_rate: jax.Array
    layer_dropout_rate: jax.Array


class Recipe(NamedTuple):
    """What LayerSkip does at one step, as arrays [L]."""

    dropout_rates: jax.Array
    exit_active: jax.Array
    exit_weights: jax.Array
    exit_distillation: jax.Array


def recipe_at(step: jax.Array | int, config: Config) -> Recipe:
    s: LayerSkipConfig = config.layerskip
    layers, total = config.model.num_layers, config.training.total_steps
    rates = layer_dropout_rates(
        layers, s.dropout_max_rate, step, total, s.dropout_depth_schedule, s.dropout_time_schedule
    )
    active = active_exits(s, layers, step, total)
    weights = exit_weights(layers, s.exit_scale, active, s.exit_weight_floor)
    return Recipe(rates, active, weights, exit_distillation(s, layers, step, total))


def init_state(config: Config) -> TrainState:
    """Random parameters from training.seed, and a fresh optimizer."""
    params = init_params(jax.random.key(config.training.seed), config.model)
    return TrainState(jnp.int32(0), params, make_optimizer(config.training).init(params))


def state_shardings(config: Config, mesh: Mesh) -> TrainState:
    return tree_shardings(jax.eval_shape(lambda: init_state(config)), mesh)


def check_microbatch(config: Config, mesh: Mesh) -> None:
    """Raises UserError where a microbatch does not divide over the devices, or over the rows run together."""
    t, s = config.training, config.layerskip
    check_batch(t.batch_size // t.gradient_accumulation, mesh, "a microbatch")
    rows = t.batch_size // t.gradient_accumulation // (mesh.shape["data"] * mesh.shape["fsdp"])
    if s.dropout_granularity == "subset" and s.dropout_max_rate and rows % s.dropout_groups:
        raise UserError(
            f"config.layerskip.dropout_groups ({s.dropout_groups}) must divide the {rows} sequence(s) of a microbatch "
            "that a device has"
        )


def make_train_step(config: Config, mesh: Mesh):
    """jitted (state, batch) -> (state, StepMetrics). `state` is donated; rotation of exits never recompiles. Raises
    UserError where a microbatch does not divide."""
    check_microbatch(config, mesh)
    shardings, platform = state_shardings(config, mesh), mesh.devices.flat[0].platform
    replicated = NamedSharding(mesh, P())
    return jax.jit(
        functools.partial(
            train_step,
            config=config,
            execution=choose_execution(config, platform),
            gradient_shardings=shardings.params,
        ),
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
        compiler_options=COMPILER_OPTIONS[platform],
    )


def train_step(
    state: TrainState, batch: Batch, *, config: Config, execution: Execution | None = None, gradient_shardings=None
):
    """One optimizer update from one batch [B, S] (split into gradient_accumulation parts)."""
    recipe = recipe_at(state.step, config)
    gradients, loss, exit_losses = mean_gradients(state, batch, recipe, config, execution, gradient_shardings)
    updates, optimizer = make_optimizer(config.training).update(gradients, state.optimizer, state.params)
    metrics = StepMetrics(
        loss=loss,
        exit_losses=exit_losses,
        exit_active=recipe.exit_active,
        gradient_norm=optax.global_norm(gradients),
        learning_rate=jnp.float32(learning_rate_schedule(config.training)(state.step + 1)),
        layer_dropout_rate=jnp.mean(recipe.dropout_rates),
    )
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), optimizer), metrics


def mean_gradients(
    state: TrainState,
    batch: Batch,
    recipe: Recipe,
    config: Config,
    execution: Execution | None = None,
    gradient_shardings=None,
):
    """Gradient (laid out as given), loss and exit losses [L] per learned token, over the microbatches."""
    t, execution = config.training, execution or choose_execution(config)
    tokens = jnp.maximum(jnp.sum(batch.weights), 1.0)
    gradient_of = jax.value_and_grad(_loss_sum, has_aux=True)

    def microbatch(index, part):
        mask = layer_mask_at(state.step, index, recipe, config)
        with rounding_products(execution.rounds_products):
            (loss, exit_losses), gradients = gradient_of(
                state.params, part, recipe, state.step, mask, config, execution
            )
        return gradients, loss, exit_losses

    if t.gradient_accumulation == 1:
        total = microbatch(0, batch)
    else:
        # Row r goes to part r mod A: each part then has rows of every device, and nothing moves.
        parts = jax.tree.map(lambda a: a.reshape(-1, t.gradient_accumulation, a.shape[1]).swapaxes(0, 1), batch)
        add = lambda total, x: (jax.tree.map(jnp.add, total, microbatch(*x)), None)  # noqa: E731
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(microbatch, 0, jax.tree.map(lambda a: a[0], parts)))
        total, _ = jax.lax.scan(add, zeros, (jnp.arange(t.gradient_accumulation), parts))
    gradients, loss, exit_losses = jax.tree.map(lambda a: a / tokens, total)
    if gradient_shardings is not None:  # the compiler, left alone, has replicated gradients
        gradients = jax.lax.with_sharding_constraint(gradients, gradient_shardings)
    return gradients, loss, exit_losses


def layer_mask_at(step: jax.Array | int, part: jax.Array | int, recipe: Recipe, config: Config) -> jax.Array | None:
    """What dropout leaves of the layers in a step's part of the batch, the same each time (a "subset" on as many
    devices, that is); None: everything."""
    t, s = config.training, config.layerskip
    if not s.dropout_max_rate:
        return None
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(t.seed + 1), step), part)
    rows = t.batch_size // t.gradient_accumulation
    how = s.dropout_granularity, s.dropout_rescale, batch_ways(), s.dropout_groups
    return draw_layer_mask(key, recipe.dropout_rates, rows, *how)


def _pieces(config: Config) -> tuple[int, ...] | None:
    """In what pieces a device runs the sequences that a layer keeps; None: all at once."""
    t, s = config.training, config.layerskip
    if s.dropout_granularity != "subset" or not s.dropout_max_rate:
        return None
    return subset_pieces(s.dropout_max_rate, t.batch_size // t.gradient_accumulation // batch_ways(), s.dropout_groups)


def _loss_sum(
    params: Params,
    batch: Batch,
    recipe: Recipe,
    step: jax.Array,
    layer_mask: jax.Array | None,
    config: Config,
    execution: Execution,
):
    t, s = config.training, config.layerskip
    frozen = is_frozen(t, params)
    params = jax.tree.map(lambda a, still: jax.lax.stop_gradient(a) if still else a, params, frozen)
    return multi_exit_loss(
        jax.tree.map(lambda a: a.astype(execution.compute_dtype), params),
        batch,
        config.model,
        exit_weights=recipe.exit_weights,
        exit_active=recipe.exit_active if s.draft_exit or s.exit_curriculum != "none" else None,
        layer_mask=layer_mask,
        distillation=recipe.exit_distillation if s.exit_distillation else None,
        z_loss=t.z_loss,
        token_stride=s.exit_token_stride,
        token_offset=step % s.exit_token_stride,
        exits_train_head=s.exits_train_head,
        head_learns=not jax.tree.leaves(head_matrix(frozen))[0],
        loss_chunk=t.loss_chunk,
        attention=execution.attention.attend,
        rematerialize=t.rematerialize,
        unroll=t.scan_unroll,
        pieces=_pieces(config),
    )


def microbatch_residuals(config: Config, execution: Execution) -> int:
    """Bytes, over all devices, of the activations that one microbatch keeps for its backward pass: what is stacked
    layer upon layer [L, B, ...]."""
    t = config.training
    rows = t.batch_size // t.gradient_accumulation
    tokens = jax.ShapeDtypeStruct((rows, t.sequence_length), jnp.int32)
    weights = jax.ShapeDtypeStruct(tokens.shape, jnp.float32)
    params = jax.eval_shape(lambda: init_state(config)).params

    def backward(params, tokens, weights):
        batch, recipe, step = Batch(tokens, tokens, weights), recipe_at(0, config), jnp.int32(0)
        mask = layer_mask_at(step, 0, recipe, config)
        loss = lambda p: _loss_sum(p, batch, recipe, step, mask, config, execution)  # noqa: E731
        return jax.vjp(loss, params, has_aux=True)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, params, tokens, weights))
    layers = {leaf.shape for leaf in jax.tree.leaves(params["layers"])}
    stacked = [a for a in kept if a.ndim > 2 and a.shape[0] == config.model.num_layers and a.shape not in layers]
    return sum(a.size * a.dtype.itemsize for a in stacked)
