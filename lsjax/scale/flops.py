"""How many floating point operations a token costs, counted from the model's shape, and how much of a chip that is.

XLA's own count takes the body of a layer loop once, so it is no use here.
"""

from typing import NamedTuple

import jax

from lsjax.config import Config, ModelConfig

# Peak dense bfloat16 FLOP/s of one device, from the vendors' data sheets, by the beginning of jax's `device_kind`.
_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


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
    """Matrix products only: 2 per multiplication and addition."""
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


def peak_flops(device: jax.Device) -> float | None:
    """FLOP/s in bfloat16; None for a device that is not in the table (a CPU, say)."""
    kinds = [kind for kind in _PEAKS if device.device_kind.startswith(kind)]
    return _PEAKS[max(kinds, key=len)] if kinds else None


def utilization(config: Config, tokens_per_second: float, devices: int, peak: float) -> dict[str, float]:
    """Model FLOPs utilisation in both conventions: {"mfu": full attention, "mfu_causal": causal}."""
    achieved = tokens_per_second / (devices * peak)
    return {
        "mfu": model_flops_per_token(config) * achieved,
        "mfu_causal": model_flops_per_token(config, causal=True) * achieved,
    }
