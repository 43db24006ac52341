"""Layer dropout: how often each layer is skipped, and the masks that skip it (Eq. 1-4)."""

import jax
import jax.numpy as jnp

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
    """p = S(t) D(l) p_max for every layer (Eq. 2): float32 [L]. `step` may be traced.

    depth_schedule: "exponential" exp(l ln2/(L-1)) - 1 (Eq. 3), "linear" l/(L-1), "uniform" 1.
    time_schedule: "constant" 1, "exponential" exp(t ln2/(T-1)) - 1 (Eq. 4), "linear_decay" 1 - t/(T-1).
    """
    layer = jnp.arange(num_layers) / max(num_layers - 1, 1)
    time = jnp.asarray(step, jnp.float32) / max(total_steps - 1, 1)
    if depth_schedule not in DEPTH_SCHEDULES or time_schedule not in TIME_SCHEDULES:
        raise ValueError(f"unknown layer dropout schedule {depth_schedule!r} or {time_schedule!r}")
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
    """M(p) of Eq. 1 as an explicit array: 0 skips, else 1 (or 1/(1-p) when rescaling, arXiv 2609.05275).

    rates [L]. granularity "sample" gives [L, B], each sequence on its own; "subset" too, but as many of each of
    `devices` equal parts of the batch, whole ones of its `groups`; "batch" gives [L], one draw for the whole batch. The
    latter two let compute really be skipped.
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
    """How many of them no rate up to max_rate drops."""
    return int((1.0 - max_rate) * groups + 1e-6)


def subset_pieces(max_rate: float, rows: int, groups: int) -> tuple[int, ...]:
    """The rows of a device in the pieces that "subset" runs: all groups that no rate up to max_rate drops, then one by
    one those that it may."""
    always = groups_always_run(max_rate, groups)
    return (always * (rows // groups), *[rows // groups] * (groups - always))


def _draw_subset(key: jax.Array, rates: jax.Array, shape: tuple[int, int], groups: int) -> jax.Array:
    """bool [L, devices, rows], shape = (devices, rows): of every device as many, at random; each row is kept with
    probability 1 - p."""
    count_key, order_key = jax.random.split(key)
    # Rounded up or down at random, so that the mean is that of rows drawn on their own.
    kept = jnp.floor((1.0 - rates) * groups + jax.random.uniform(count_key, rates.shape))
    order = jnp.argsort(jax.random.uniform(order_key, rates.shape + shape), axis=-1)
    return order < (shape[1] // groups * kept)[:, None, None]
