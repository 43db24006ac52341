"""AdamW with warm-up, cosine decay and clipping by global norm."""

import jax
import optax

from lsjax.config import TrainingConfig


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
