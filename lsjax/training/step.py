"""One training step: a pure function of arrays, jitted once."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lsjax.config import Config, LayerSkipConfig
from lsjax.data.batch import Batch
from lsjax.errors import UserError
from lsjax.layerskip.adapter_loss import adapter_loss
from lsjax.layerskip.dropout import draw_layer_mask, layer_dropout_rates, subset_pieces
from lsjax.layerskip.exits import active_exits, exit_distillation, exit_weights
from lsjax.layerskip.loss import multi_exit_loss
from lsjax.model.execution import COMPILER_OPTIONS, Execution, choose_execution
from lsjax.model.exit_adapter import ExitAdapter, init_kernel
from lsjax.model.lora import adapt, init_adapter, merge
from lsjax.model.matmul import rounding_products
from lsjax.model.selection import is_frozen, lora_scale, lora_targets
from lsjax.model.transformer import Params, abstract_params, head_matrix, init_params
from lsjax.parallel.sharding import batch_sharding, batch_ways, check_batch, tree_shardings
from lsjax.training.optimizer import learning_rate_schedule, make_optimizer


class TrainState(NamedTuple):
    """The arrays of a run. `step` counts finished steps; it is t of the equations for the next one.

    params: the model's parameters or, with LoRA, an adapter (lsjax/model/lora.py). They are saved.
    base: with LoRA, the parameters of the initial model in the compute dtype. No step changes them.
    exit_adapter: {kernel [D,D]}, the only part that layerskip.exit_adapter trains; None without one.
    """

    step: jax.Array
    params: Params
    optimizer: optax.OptState
    base: Params | None = None
    exit_adapter: Params | None = None

    @property
    def trained(self) -> Params:
        """The part that steps change, and that the optimizer knows."""
        return self.params if self.exit_adapter is None else self.exit_adapter

    def adapter(self, config: Config) -> ExitAdapter | None:
        """Returns the adapter of the exit that `config` drafts with."""
        if self.exit_adapter is None:
            return None
        return ExitAdapter(config.layerskip.draft_exit, self.exit_adapter["kernel"])


class StepMetrics(NamedTuple):
    """Device arrays of one step. Losses are nats per token.

    loss: J of Eq. 5. exit_losses: [L], 0 where `exit_active` [L] is False. gradient_norm: before clipping.
    layer_dropout_rate: mean over the layers.
    """

    loss: jax.Array
    exit_losses: jax.Array
    exit_active: jax.Array
    gradient_norm: jax.Array
    learning_rate: jax.Array
    layer_dropout_rate: jax.Array


class Recipe(NamedTuple):
    """The LayerSkip schedules at one step, as arrays [L]."""

    dropout_rates: jax.Array
    exit_active: jax.Array
    exit_weights: jax.Array
    exit_distillation: jax.Array


def recipe_at(step: jax.Array | int, config: Config) -> Recipe:
    """Returns the LayerSkip schedules at a step, which may be traced."""
    s: LayerSkipConfig = config.layerskip
    layers, total = config.model.num_layers, config.training.total_steps
    rates = layer_dropout_rates(
        layers, s.dropout_max_rate, step, total, s.dropout_depth_schedule, s.dropout_time_schedule
    )
    active = active_exits(s, layers, step, total)
    weights = exit_weights(layers, s.exit_scale, active, s.exit_weight_floor)
    return Recipe(rates, active, weights, exit_distillation(s, layers, step, total))


def init_state(config: Config, execution: Execution | None = None) -> TrainState:
    """Returns random parameters drawn from training.seed, and a fresh optimizer.

    With LoRA the random parameters are the base. execution: decides the base's dtype; None chooses as `train_step`.
    """
    params = init_params(jax.random.key(config.training.seed), config.model)
    if config.training.lora_rank:
        dtype = (execution or choose_execution(config)).compute_dtype
        return init_adapter_state(config)._replace(base=jax.tree.map(lambda a: a.astype(dtype), params))
    kernel = {"kernel": init_kernel(config.model)} if config.layerskip.exit_adapter != "none" else None
    state = TrainState(jnp.int32(0), params, (), exit_adapter=kernel)
    return state._replace(optimizer=make_optimizer(config.training).init(state.trained))


def init_adapter_state(config: Config) -> TrainState:
    """Returns the first state of a run with LoRA, without its base: an adapter that changes nothing yet."""
    t, shapes = config.training, abstract_params(config.model)
    key = jax.random.fold_in(jax.random.key(t.seed), 3)  # init_params splits this key into numbers 0 to 2
    adapter = init_adapter(key, shapes, lora_targets(t, shapes), t.lora_rank)
    return TrainState(jnp.int32(0), adapter, make_optimizer(t).init(adapter))


def state_shardings(config: Config, mesh: Mesh) -> TrainState:
    """Returns the layout of every array of the state over a mesh."""
    execution = choose_execution(config, mesh.devices.flat[0])
    return tree_shardings(jax.eval_shape(lambda: init_state(config, execution)), mesh)


def model_params(state: TrainState, config: Config) -> Params:
    """Returns the parameters that the model runs with: the state's own or, with LoRA, the base with its adapter."""
    return state.params if state.base is None else adapt(state.base, state.params, lora_scale(config.training))


def merged_params(state: TrainState, config: Config) -> Params:
    """Returns the model as plain parameters. With LoRA it gives up the base's memory for them; the state is spent."""
    if state.base is None:
        return state.params
    shardings = jax.tree.map(lambda a: a.sharding, state.base)
    program = functools.partial(merge, scale=lora_scale(config.training))
    return jax.jit(program, donate_argnums=0, out_shardings=shardings)(state.base, state.params)


def check_microbatch(config: Config, mesh: Mesh) -> None:
    """Raises UserError when a microbatch does not divide over the devices, or over dropout_groups."""
    t, s = config.training, config.layerskip
    check_batch(t.batch_size // t.gradient_accumulation, mesh, "a microbatch")
    sequences = t.batch_size // t.gradient_accumulation // (mesh.shape["data"] * mesh.shape["fsdp"])
    if s.dropout_granularity == "subset" and s.dropout_max_rate and sequences % s.dropout_groups:
        raise UserError(
            f"config.layerskip.dropout_groups ({s.dropout_groups}) must divide the {sequences} sequence(s) of a "
            "microbatch on each device"
        )


def make_train_step(config: Config, mesh: Mesh, execution: Execution | None = None) -> Any:
    """Returns the jitted step: (state, batch) -> (state, StepMetrics).

    The step donates `state` and never recompiles when the active exits change. Raises UserError when a microbatch does
    not divide. execution: None chooses it from the configuration and the mesh's first device.
    """
    check_microbatch(config, mesh)
    shardings, device = state_shardings(config, mesh), mesh.devices.flat[0]
    replicated = NamedSharding(mesh, P())
    return jax.jit(
        functools.partial(
            train_step,
            config=config,
            execution=execution or choose_execution(config, device),
            gradient_shardings=shardings.trained,
        ),
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
        compiler_options=COMPILER_OPTIONS[device.platform],
    )


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    config: Config,
    execution: Execution | None = None,
    gradient_shardings: Params | None = None,
) -> tuple[TrainState, StepMetrics]:
    """Runs one optimizer update on one batch [B, S], split into gradient_accumulation microbatches."""
    recipe = recipe_at(state.step, config)
    gradients, loss, exit_losses = mean_gradients(state, batch, recipe, config, execution, gradient_shardings)
    updates, optimizer = make_optimizer(config.training).update(gradients, state.optimizer, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    metrics = StepMetrics(
        loss=loss,
        exit_losses=exit_losses,
        exit_active=recipe.exit_active,
        gradient_norm=optax.tree.norm(gradients),
        learning_rate=jnp.float32(learning_rate_schedule(config.training)(state.step + 1)),
        layer_dropout_rate=jnp.mean(recipe.dropout_rates),
    )
    after = state._replace(step=state.step + 1, optimizer=optimizer)
    return after._replace(**{"params" if state.exit_adapter is None else "exit_adapter": trained}), metrics


@jax.jit
def is_finite(state: TrainState) -> jax.Array:
    """Returns whether every trained parameter and optimizer moment is finite: bool [].

    A program of its own, for the states that are saved: inside the step it would read the whole state once more.
    """
    numbers = [a for a in jax.tree.leaves(state._replace(base=None)) if jnp.issubdtype(a.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(a).all() for a in numbers]).all()


def mean_gradients(
    state: TrainState,
    batch: Batch,
    recipe: Recipe,
    config: Config,
    execution: Execution | None = None,
    gradient_shardings: Params | None = None,
) -> tuple[Params, jax.Array, jax.Array]:
    """Returns the gradient, the loss and the exit losses [L], each a mean over the learned tokens of all microbatches.

    The gradient is that of what the state trains.
    gradient_shardings: the layout of the gradient; None leaves it to the compiler.
    """
    t, execution = config.training, execution or choose_execution(config)
    tokens = jnp.maximum(jnp.sum(batch.weights), 1.0)

    def microbatch(index, part):
        mask = layer_mask_at(state.step, index, recipe, config)

        def loss_of(trained):
            if state.exit_adapter is None:
                return _loss_sum(trained, state, part, recipe, mask, config, execution)
            return _adapter_loss_sum(trained, state, part, config, execution)

        with rounding_products(execution.rounds_products):
            (loss, exit_losses), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.trained)
        return gradients, loss, exit_losses

    if t.gradient_accumulation == 1:
        total = microbatch(0, batch)
    else:
        # Sequence r goes to microbatch r mod A: each then has sequences of every device, and nothing moves.
        parts = jax.tree.map(lambda a: a.reshape(-1, t.gradient_accumulation, a.shape[1]).swapaxes(0, 1), batch)

        def add(total, index_and_part):
            index, part = index_and_part
            return jax.tree.map(jnp.add, total, microbatch(index, part)), None

        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(microbatch, 0, jax.tree.map(lambda a: a[0], parts)))
        total, _ = jax.lax.scan(add, zeros, (jnp.arange(t.gradient_accumulation), parts))
    gradients, loss, exit_losses = jax.tree.map(lambda a: a / tokens, total)
    if gradient_shardings is not None:  # without this constraint, the compiler has replicated gradients
        gradients = jax.lax.with_sharding_constraint(gradients, gradient_shardings)
    return gradients, loss, exit_losses


def layer_mask_at(step: jax.Array | int, part: jax.Array | int, recipe: Recipe, config: Config) -> jax.Array | None:
    """Returns the layer mask of one microbatch ([L] or [L, B]), or None when nothing is dropped.

    The mask depends on the seed, `step` and `part` (the number of the microbatch). With "subset" granularity it also
    depends on the number of devices.
    """
    t, s = config.training, config.layerskip
    if not s.dropout_max_rate:
        return None
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(t.seed + 1), step), part)
    return draw_layer_mask(
        key,
        recipe.dropout_rates,
        t.batch_size // t.gradient_accumulation,
        granularity=s.dropout_granularity,
        rescale=s.dropout_rescale,
        devices=batch_ways(),
        groups=s.dropout_groups,
    )


def _pieces(config: Config) -> tuple[int, ...] | None:
    """Returns the sizes of the pieces in which a device runs the sequences that a layer keeps. None means one piece."""
    t, s = config.training, config.layerskip
    if s.dropout_granularity != "subset" or not s.dropout_max_rate:
        return None
    return subset_pieces(s.dropout_max_rate, t.batch_size // t.gradient_accumulation // batch_ways(), s.dropout_groups)


def _loss_sum(
    trained: Params,
    state: TrainState,
    batch: Batch,
    recipe: Recipe,
    layer_mask: jax.Array | None,
    config: Config,
    execution: Execution,
) -> tuple[jax.Array, jax.Array]:
    """Returns the loss and the exit losses [L] of one microbatch, summed over its learned tokens.

    trained: the state's `params`, apart from the state because the gradient is taken for them alone.
    """
    t, s = config.training, config.layerskip
    if state.base is None:
        frozen = is_frozen(t, trained)
        trained = jax.tree.map(lambda a, still: jax.lax.stop_gradient(a) if still else a, trained, frozen)
        head_learns = not jax.tree.leaves(head_matrix(frozen))[0]
    else:
        head_learns = not trained.keys().isdisjoint(head_matrix(state.base))
    params = model_params(state._replace(params=trained), config)
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
        token_offset=state.step % s.exit_token_stride,
        exits_train_head=s.exits_train_head,
        head_learns=head_learns,
        loss_chunk=t.loss_chunk,
        attention=execution.attention.attend,
        rematerialize=t.rematerialize,
        unroll=t.scan_unroll,
        pieces=_pieces(config),
    )


def _adapter_loss_sum(
    trained: Params, state: TrainState, batch: Batch, config: Config, execution: Execution
) -> tuple[jax.Array, jax.Array]:
    """Returns what `_loss_sum` does, when the exit's adapter alone is trained."""
    t, s = config.training, config.layerskip
    exit_adapter, params = jax.tree.map(lambda a: a.astype(execution.compute_dtype), (trained, state.params))
    return adapter_loss(
        ExitAdapter(s.draft_exit, exit_adapter["kernel"]),
        params,
        batch,
        config.model,
        token_stride=s.exit_token_stride,
        token_offset=state.step % s.exit_token_stride,
        loss_chunk=t.loss_chunk,
        attention=execution.attention.attend,
        unroll=t.scan_unroll,
    )


def microbatch_residuals(config: Config, execution: Execution) -> int:
    """Returns the bytes, over all devices, of the activations that one microbatch keeps for its backward pass.

    These are the arrays that are stacked over the layers: [L, B, ...].
    """
    if config.layerskip.exit_adapter != "none":  # the backward pass does not reach the layers
        return 0
    t = config.training
    sequences = t.batch_size // t.gradient_accumulation
    tokens = jax.ShapeDtypeStruct((sequences, t.sequence_length), jnp.int32)
    weights = jax.ShapeDtypeStruct(tokens.shape, jnp.float32)
    state = jax.eval_shape(lambda: init_state(config, execution))

    def backward(state, tokens, weights):
        batch, recipe = Batch(tokens, tokens, weights), recipe_at(0, config)
        mask = layer_mask_at(jnp.int32(0), 0, recipe, config)

        def loss(trained):
            return _loss_sum(trained, state, batch, recipe, mask, config, execution)

        return jax.vjp(loss, state.params, has_aux=True)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, state, tokens, weights))
    layers = {leaf.shape for leaf in jax.tree.leaves((state.params, state.base))}
    stacked = [a for a in kept if a.ndim > 2 and a.shape[0] == config.model.num_layers and a.shape not in layers]
    return sum(a.size * a.dtype.itemsize for a in stacked)
