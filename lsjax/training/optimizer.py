"""AdamW with warm-up, cosine decay and clipping by global norm."""

import jax
import optax

from lsjax.config import TrainingConfig
from lsjax.errors import UserError


def learning_rate_schedule(config: TrainingConfig) -> optax.Schedule:
    """Linear from 0 over warmup_steps, then cosine to final_learning_rate_fraction of the peak at total_steps."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(config.total_steps, config.warmup_steps + 1),
        end_value=config.learning_rate * config.final_learning_rate_fraction,
    )


def make_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """Frozen parameters have neither updates nor moments."""
    learning = _adamw(config)
    if not config.frozen:
        return learning
    return optax.partition({True: optax.set_to_zero(), False: learning}, lambda params: is_frozen(config, params))


def is_frozen(config: TrainingConfig, params):
    """The tree of parameters as booleans. Raises UserError when config.training.frozen names none, or all of them."""
    prefixes = [prefix.strip() for prefix in config.frozen.split(",") if prefix.strip()]
    paths = jax.tree_util.tree_map_with_path(lambda path, _: "/".join(key.key for key in path), params)
    for prefix in prefixes:
        if not any(_begins(path, prefix) for path in jax.tree.leaves(paths)):
            known = ", ".join(jax.tree.leaves(paths))
            raise UserError(f"config.training.frozen: {prefix!r} is no parameter; there are {known}")
    frozen = jax.tree.map(lambda path: any(_begins(path, prefix) for prefix in prefixes), paths)
    if all(jax.tree.leaves(frozen)):
        raise UserError("config.training.frozen leaves nothing to train")
    return frozen


def _begins(path: str, prefix: str) -> bool:
    return f"{path}/".startswith(f"{prefix}/")


def _adamw(config: TrainingConfig) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(config.gradient_clip),
        optax.adamw(
            # The first step, number 0, would be wasted at a rate of exactly 0.
            lambda count: learning_rate_schedule(config)(count + 1),
            b1=config.adam_b1,
            b2=config.adam_b2,
            weight_decay=config.weight_decay,
            mask=_is_matrix,
        ),
    )


def _is_matrix(params):
    """Norm scales are not decayed; everything else is a matrix."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)
