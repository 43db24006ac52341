"""The bytes that a pass reads, counted by hand, and their rate beside that of a plain read."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lsjax.benchmarks.bandwidth import PlainRead, bytes_per_round
from lsjax.decoding.forward import decoder_weights, init_cache
from lsjax.decoding.strategies import Autoregressive
from tests.conftest import random_params


@pytest.mark.parametrize("tied", [True, False])
def test_a_pass_reads_every_weight_and_every_cache_entry(tiny, tied):
    config = dataclasses.replace(tiny, tie_embeddings=tied)
    weights = decoder_weights(random_params(config), jnp.bfloat16)
    arrays = [*jax.tree.leaves(weights["layers"]), weights["final_norm"]["scale"]]
    arrays += [weights["embed"] if tied else weights["lm_head"].kernel]
    cache = jax.tree.leaves(init_cache(config, 3, 40, jnp.bfloat16))
    assert bytes_per_round(weights, config, Autoregressive(), batch_size=3, entries=40) == sum(
        a.size * 2 for a in (*arrays, *cache)
    )


def test_the_share_is_bytes_over_seconds_over_those_of_the_read(varied, varied_params):
    read = PlainRead(decoder_weights(varied_params, jnp.float32))
    for _ in range(3):
        read.measure()
    assert len(read.times) == 3
    read.times = [2.0, 1.0, 9.0]
    every = sum(leaf.size * 4 for leaf in jax.tree.leaves(varied_params))
    assert read.bytes_per_second() == every / 2.0
    summary = read.summary(every, 4.0)
    assert summary["autoregressive_share"] == 0.5
    assert summary["autoregressive_gigabytes_per_second"] == every / 4.0 / 1e9
    assert read.summary(every, None)["autoregressive_share"] is None
