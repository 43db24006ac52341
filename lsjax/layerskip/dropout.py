"""Layer dropout (Eq. 1-4): how often each layer is skipped, and the random masks that skip it."""

import jax
import jax.numpy as jnp

from lsjax.model.array_checks import check_choice, check_integer, check_number

LN2 = 0.6931471805599453
DEPTH_SCHEDULES = ("exponential", "linear", "uniform")
TIME_SCHEDULES = ("constant", "exponential", "linear_decay")


def layer_dropout_rates(
    num_layers: int,
    max_rate: float,
    step: jax.Array | int,
    total_steps: int,
    depth_schedule: str = "exponential",
    time_schedule: str = "constant",
) -> jax.Array:
    """Returns the dropout rate of every layer, p = S(t) D(l) p_max (Eq. 2): float32 [L].

    max_rate: p_max.
    step: t, which may be traced; total_steps: T.
    depth_schedule: D(l). "exponential" is exp(l ln2/(L-1)) - 1 (Eq. 3), "linear" l/(L-1), "uniform" 1.
    time_schedule: S(t). "constant" is 1, "exponential" exp(t ln2/(T-1)) - 1 (Eq. 4), "linear_decay" 1 - t/(T-1).

    Raises UserError for an unknown schedule, or a number outside its range (a traced step is not checked).
    """
    check_integer("num_layers", num_layers, 1)
    check_number("max_rate", max_rate, 0, 1)
    check_integer("total_steps", total_steps, 1)
    check_integer("step", step, 0, total_steps - 1)
    check_choice("depth_schedule", depth_schedule, DEPTH_SCHEDULES)
    check_choice("time_schedule", time_schedule, TIME_SCHEDULES)
    layer = jnp.arange(num_layers) / max(num_layers - 1, 1)
    time = jnp.asarray(step, jnp.float32) / max(total_steps - 1, 1)
    depth = {
        "exponential": lambda: jnp.expm1(layer * LN2),
        "linear": lambda: layer,
        "uniform": lambda: jnp.ones(num_layers),
    }[depth_schedule]()
    scale = {
        "constant": lambda: 1.0,
        "exponential": lambda: jnp.expm1(time * LN2),
        "linear_decay": lambda: 1.0 - time,
    }[time_schedule]()
    return jnp.asarray(max_rate * scale * depth, jnp.float32)


def draw_layer_mask(
    key: jax.Array,
    rates: jax.Array,
    batch_size: int,
    granularity: str = "sample",
    rescale: bool = False,
    devices: int = 1,
    groups: int = 1,
) -> jax.Array:
    """Draws M(p) of Eq. 1 as an explicit array: 0 skips, any other value keeps.

    rates: p, [L].
    granularity: "sample" returns [L,B] and draws for each sequence on its own. "subset" returns [L,B] too, but keeps
        the same number of sequences on each of `devices` equal parts of the batch, in whole groups of the part's
        `groups`. "batch" returns [L], one draw for the whole batch. The last two let compute really be skipped.
    rescale: kept entries are 1/(1-p) (arXiv 2609.05275) and not 1.
    """
    if granularity == "subset":
        keep = _draw_subset(key, rates, (devices, batch_size // devices), groups).reshape(-1, batch_size)
    else:
        shape = (rates.shape[0], batch_size) if granularity == "sample" else rates.shape
        keep = jax.random.uniform(key, shape) >= rates.reshape(rates.shape + (1,) * (len(shape) - 1))
    rates = rates.reshape(rates.shape + (1,) * (keep.ndim - 1))
    scale = 1.0 / (1.0 - rates) if rescale else jnp.ones_like(rates)
    return jnp.where(keep, scale, 0.0)


def groups_always_run(max_rate: float, groups: int) -> int:
    """Returns how many of the groups are kept at every rate up to max_rate."""
    return int((1.0 - max_rate) * groups + 1e-6)


def subset_pieces(max_rate: float, rows: int, groups: int) -> tuple[int, ...]:
    """Returns the sizes of the pieces in which "subset" runs the `rows` sequences of a device.

    The first piece holds all groups that no rate up to max_rate drops; every other group is a piece of its own.
    """
    always = groups_always_run(max_rate, groups)
    return (always * (rows // groups), *[rows // groups] * (groups - always))


def _draw_subset(key: jax.Array, rates: jax.Array, shape: tuple[int, int], groups: int) -> jax.Array:
    """Draws which rows to keep, the same number on every device: bool [L,devices,rows], shape = (devices, rows).

    Each row is kept with probability 1 - p.
    """
    count_key, order_key = jax.random.split(key)
    # The count is rounded up or down at random, so that its mean is that of independently drawn rows.
    kept = jnp.floor((1.0 - rates) * groups + jax.random.uniform(count_key, rates.shape))
    order = jnp.argsort(jax.random.uniform(order_key, rates.shape + shape), axis=-1)
    return order < (shape[1] // groups * kept)[:, None, None]
