"""Topologies in the form that users write."""

import pytest

from lsjax.costs.hardware import CHIPS, parse_topology
from lsjax.errors import UserError


@pytest.mark.parametrize(
    ("text", "shape", "size"),
    [("tpu:v5p:4x4x4", (4, 4, 4), 64), ("gpu:h100:8x8", (8, 8), 64), ("gpu:a100-80:8", (1, 8), 8)],
)
def test_topologies(text, shape, size):
    topology = parse_topology(text)
    assert (topology.shape, topology.size, topology.chip) == (shape, size, CHIPS[text.rpartition(":")[0]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tpu:v9:4x4", "a chip of tpu:v4, tpu:v5e"),
        ("h100:8x8", "a chip of"),
        ("tpu:v5p:4x4", "a size of tpu:v5p is NxNxN"),
        ("gpu:h100:2x2x2", "a size of gpu:h100 is HOSTSxGPUS"),
        ("tpu:v5e:4x", "numbers with x between them"),
        ("tpu:v5e:0x4", "numbers with x between them"),
        ("", "CHIP:SIZE"),
    ],
)
def test_a_malformed_topology_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_topology(text)
