"""Decoding loops split over devices. Kernels work on a device's own KV heads, so nothing is sent or copied for them."""

import collections

import pytest

import lsjax
from lsjax.aot.collectives import collectives
from tests.ahead_of_time.test_decoding import DRAFTING, KERNELS, D, compiled, kernels_in_place, passes


def sent(program, ways: int) -> collections.Counter:
    """Counts what devices send each other, by (kind, bytes per device)."""
    counts = collections.Counter()
    for collective in collectives(program, ways):
        counts[collective.kind, collective.payload] += collective.times
    return counts


@pytest.mark.parametrize(
    ("topology", "strategy", "rows", "ways"),
    [
        ("tpu:v5e:2x2", DRAFTING, 1, 2),
        ("gpu:h100:1x2", DRAFTING, 1, 2),
        ("gpu:h100:1x2", lsjax.Autoregressive(), 4, 2),
    ],
    ids=str,
)
def test_a_split_loop_with_kernels_sends_and_copies_nothing_for_them(topology, strategy, rows, ways):
    """Devices send what they send in plain JAX: the states of the tokens of one pass, no weight and no cache."""
    program, memory = compiled(topology, strategy, rows, kernels="on", ways=ways)
    counts, _ = kernels_in_place(program, memory, rows, ways)
    combined = passes(strategy) * topology.startswith("gpu")
    assert counts == dict.fromkeys(KERNELS, passes(strategy)) | {"decode_combine": combined}
    plain, _ = compiled(topology, strategy, rows, ways=ways)
    assert sent(program, ways) == sent(plain, ways)
    states = rows * (1 + (strategy.settings()["num_speculations"] or 0)) * D * 2  # bfloat16
    assert 0 < max(payload for _, payload in sent(program, ways)) <= states
