"""The optimizer: AdamW with warm-up, cosine decay and clipping by global norm."""

from typing import Any

import jax
import optax

from lsjax.config import TrainingConfig
from lsjax.model.selection import is_frozen
from lsjax.model.transformer import Params


def learning_rate_schedule(config: TrainingConfig) -> optax.Schedule:
    """Returns the schedule: linear from 0 over warmup_steps, then a cosine that ends at total_steps.

    Its last value is final_learning_rate_fraction of the peak.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(config.total_steps, config.warmup_steps + 1),
        end_value=config.learning_rate * config.final_learning_rate_fraction,
    )


def make_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """Returns clipped AdamW. Frozen parameters have neither updates nor moments; an adapter has no frozen ones."""
    learning = _adamw(config)
    if config.lora_rank or not config.frozen:
        return learning
    return optax.partition({True: optax.set_to_zero(), False: learning}, lambda params: is_frozen(config, params))


def _adamw(config: TrainingConfig) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(config.gradient_clip),
        optax.adamw(
            # Without + 1, the first step (number 0) would have a rate of exactly 0.
            lambda count: learning_rate_schedule(config)(count + 1),
            b1=config.adam_b1,
            b2=config.adam_b2,
            weight_decay=config.weight_decay,
            mask=_is_matrix,
        ),
    )


def _is_matrix(params: Params) -> Any:
    """Returns a tree of booleans: True for matrices, which are decayed, and False for norm scales, which are not."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)
