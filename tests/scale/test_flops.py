"""FLOPs against published parameter counts, and against hand counts of a model small enough to do by hand."""

import pytest

from lsjax.config import Config, ModelConfig, TrainingConfig
from lsjax.scale.flops import (
    forward_flops,
    model_flops_per_token,
    utilization,
)
from lsjax.scale.hardware import CHIPS, chip_of

LLAMA2_7B = ModelConfig(
    num_layers=32,
    width=4096,
    num_heads=32,
    num_kv_heads=32,
    head_width=128,
    feed_forward_width=11008,
    vocab_size=32000,
    context_length=4096,
    tie_embeddings=False,
)


def test_llama2_7b_is_6n_plus_attention():
    """PaLM's formula: 6 N + 12 L H Q T, N being the published 6,738,415,616 less embedding and norms."""
    matrices = 6_738_415_616 - 32_000 * 4096 - 65 * 4096
    config = Config(model=LLAMA2_7B, training=TrainingConfig(sequence_length=4096))
    assert model_flops_per_token(config) == 6 * matrices + 12 * 32 * 32 * 128 * 4096
    causal = model_flops_per_token(config, causal=True)
    assert causal == 6 * matrices + 12 * 32 * 32 * 128 * 4097 / 2


def test_grouped_heads_by_hand():
    """D=8, N=4, K=2, H=3, F=5, V=7, L=2, S=6: q 8x12, k and v 8x6, out 12x8, three of 8x5."""
    config = ModelConfig(
        num_layers=2, width=8, num_heads=4, num_kv_heads=2, head_width=3, feed_forward_width=5, vocab_size=7
    )
    flops = forward_flops(config, 6)
    assert flops.layers == 2 * 2 * (96 + 48 + 48 + 96 + 120)
    assert flops.attention_full == 2 * (2 * 6 * 12 + 2 * 6 * 12)
    assert flops.attention_causal == 2 * 2 * 2 * 12 * (1 + 2 + 3 + 4 + 5 + 6) / 6
    assert flops.head == 2 * 8 * 7


@pytest.mark.parametrize(
    ("kind", "peak"), [("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("cpu", None)]
)
def test_peaks_are_found_by_the_devices_own_name(kind, peak):
    chip = chip_of(kind)
    assert (chip and chip.peak_flops) == peak


def test_utilization_is_the_share_of_the_peak():
    config = Config(model=LLAMA2_7B, training=TrainingConfig(sequence_length=4096))
    at_peak = 64 * 989e12 / model_flops_per_token(config)
    found = utilization(config, at_peak / 2, 64, CHIPS["gpu:h100"])
    assert found["mfu"] == pytest.approx(0.5)
    assert 0.4 < found["mfu_causal"] < 0.5
