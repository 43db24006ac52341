"""How many floating point operations a token costs, counted from the model's shape.

XLA's own count takes the body of a layer loop once, so it is no use here. Matrix products only, 2 for each
multiplication and addition.
"""

from typing import NamedTuple

import numpy as np

from lsjax.config import Config, ModelConfig
from lsjax.evaluation.exits import evaluated_exits
from lsjax.layerskip.dropout import layer_dropout_rates
from lsjax.layerskip.exits import active_exits
from lsjax.scale.hardware import Chip


class TokenFlops(NamedTuple):
    """FLOPs of one token, forward. Attention counts every position (`full`), or only those that a causal token sees
    on average (`causal`): both conventions are in use."""

    layers: float
    attention_full: float
    attention_causal: float
    head: float

    def model(self, causal: bool = False) -> float:
        """Of the plain model: all layers, one head."""
        return self.layers + self.head + (self.attention_causal if causal else self.attention_full)


def forward_flops(config: ModelConfig, sequence_length: int) -> TokenFlops:
    c, S = config, sequence_length
    projections = c.width * c.head_width * (2 * c.num_heads + 2 * c.num_kv_heads)
    layer = 2 * (projections + 3 * c.width * c.feed_forward_width)
    scores_and_mix = 2 * 2 * c.num_heads * c.head_width
    return TokenFlops(
        layers=c.num_layers * layer,
        attention_full=c.num_layers * scores_and_mix * S,
        attention_causal=c.num_layers * scores_and_mix * (S + 1) / 2,
        head=2 * c.width * c.vocab_size,
    )


def model_flops_per_token(config: Config, causal: bool = False) -> float:
    """Forward and backward (twice the forward) of the plain model, the numerator of model FLOPs utilisation: no
    recomputation, no extra exits, no skipped layers."""
    return 3 * forward_flops(config.model, config.training.sequence_length).model(causal)


class StepFlops(NamedTuple):
    """FLOPs of one token in training, mean over the run. `exits`: early exits beside the last layer's; `skipped`:
    layers that dropout really leaves out; `recomputed`: by rematerialisation and inside the attention kernel.
    `executed` is what the hardware does: model, with causal attention, + exits - skipped + recomputed."""

    model: float
    model_causal: float
    exits: float
    skipped: float
    recomputed: float

    @property
    def executed(self) -> float:
        return self.model_causal + self.exits - self.skipped + self.recomputed


def step_flops(config: Config) -> StepFlops:
    c, s = config.model, config.layerskip
    forward = forward_flops(c, config.training.sequence_length)
    run = 1 - skipped_share(config)
    # Forward, gradient of the states and of the head; inside the layer loop the forward is done again.
    taught = s.exit_distillation > 0  # after the layers then, with the last layer's logits once more at every step
    passes = 2 + s.exits_train_head + (not taught)
    recomputed = run * (_recomputed_layers(config, forward) + forward.attention_causal / 2)
    return StepFlops(
        model=3 * forward.model(),
        model_causal=3 * forward.model(causal=True),
        exits=(taught + passes * early_exits(config)) * forward.head / s.exit_token_stride,
        skipped=3 * (1 - run) * (forward.layers + forward.attention_causal),
        recomputed=recomputed,
    )


def evaluation_flops(config: Config) -> float:
    """Of one token: the forward pass, and the head at each exit evaluated."""
    forward = forward_flops(config.model, config.training.sequence_length)
    exits = len(evaluated_exits(config.model.num_layers, config.evaluation.exit_stride))
    return forward.model(causal=True) + (exits - 1) * forward.head


def round_flops(config: ModelConfig, capacity: int, exit_layer: int, drafted: int, verified_from: int | None) -> float:
    """Of one row in a round of a decoding loop that reads `capacity` cache entries. `drafted` tokens through layers
    0 .. exit_layer and the head; with `verified_from` E, one more through layers 0 .. E, and d + 1 through the rest."""
    forward = forward_flops(config, capacity)
    layer = (forward.layers + forward.attention_full) / config.num_layers
    flops = drafted * (exit_layer * layer + forward.head)
    if verified_from is None:
        return flops
    rest = (config.num_layers - verified_from) * layer + forward.head
    return flops + verified_from * layer + (drafted + 1) * rest


def _recomputed_layers(config: Config, forward: TokenFlops) -> float:
    """Of a forward pass done again, by policy; the last product of a layer never is (its result is not needed)."""
    c, policy = config.model, config.training.rematerialize
    gate_up = c.num_layers * 2 * 2 * c.width * c.feed_forward_width
    if policy == "layer":
        return forward.layers - gate_up / 2 + forward.attention_causal
    return gate_up if policy == "feed_forward" else 0.0


def skipped_share(config: Config) -> float:
    """Mean over layers and steps of the layers whose compute is left out; a mask for each sample alone saves none."""
    s = config.layerskip
    if s.dropout_granularity == "sample" or not s.dropout_max_rate:
        return 0.0
    return float(np.mean([_dropout_rates(config, step) for step in _sampled_steps(config)]))


def early_exits(config: Config) -> float:
    """Mean number of exits a step beside the last one."""
    c, s, t = config.model, config.layerskip, config.training
    steps = _sampled_steps(config) if s.exit_curriculum == "gradual" else range(s.exit_rotation)
    active = [np.asarray(active_exits(s, c.num_layers, step, t.total_steps)) for step in steps]
    return float(np.mean([a[:-1].sum() for a in active]))


def _dropout_rates(config: Config, step: int) -> np.ndarray:
    s = config.layerskip
    schedules = s.dropout_depth_schedule, s.dropout_time_schedule
    total = config.training.total_steps
    return np.asarray(layer_dropout_rates(config.model.num_layers, s.dropout_max_rate, step, total, *schedules))


def _sampled_steps(config: Config) -> np.ndarray:
    """Steps spread evenly over the run, for the mean of a schedule."""
    total = config.training.total_steps
    return np.unique(np.linspace(0, total - 1, min(total, 65)).astype(int))


def utilization(config: Config, tokens_per_second: float, devices: int, chip: Chip) -> dict[str, float]:
    """Model FLOPs utilisation in both conventions: {"mfu": full attention, "mfu_causal": causal}."""
    achieved = tokens_per_second / (devices * chip.peak_flops)
    return {
        "mfu": model_flops_per_token(config) * achieved,
        "mfu_causal": model_flops_per_token(config, causal=True) * achieved,
    }
