"""A cache whose heads are split over devices, with simulated kernels: the same values, and no communication."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lsjax.config import MeshConfig
from lsjax.decoding.forward import decoder_weights
from lsjax.decoding.loops import Pause
from lsjax.decoding.lowering import DecodeShape, cache_use, lower_decoding
from lsjax.decoding.sampling import Greedy
from lsjax.decoding.shardings import kv_cache_sharding
from lsjax.decoding.strategies import Autoregressive, SelfSpeculative
from lsjax.parallel.sharding import make_mesh, tree_shardings
from pallas_kernels.kv_cache import interface as kv_cache
from pallas_kernels.kv_cache.split import SplitCache
from tests.conftest import TINY, random_params
from tests.helpers.interpreted import SIMULATED

USE = kv_cache.CacheUse(2, 8, 128, capacity=4096, mean_length=1024, tokens=5, dtype=jnp.bfloat16)

SENT = re.compile(r"all-(?:gather|reduce|to-all)|reduce-scatter|collective-permute")


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(1, 1, 2), jax.devices()[:2])


@pytest.mark.parametrize(
    ("setting", "platform", "change", "expected"),
    [
        ("on", "tpu", {"devices": 2, "shards": 2}, "tpu"),
        ("on", "gpu", {"devices": 8, "shards": 8}, "gpu"),
        ("on", "tpu", {"devices": 3, "shards": 3}, "plain (no kernels for 8 KV heads split over 3 devices)"),
        ("on", "gpu", {"devices": 2}, "plain (no kernels for a cache in 1 part(s) on 2 devices)"),
        ("auto", "tpu", {"devices": 2, "shards": 2}, "tpu"),
        # Per device: the empty entries of 8 heads outweigh two more kernels, those of 2 heads do not.
        ("auto", "gpu", {"batch_size": 1}, "gpu"),
        (
            "auto",
            "gpu",
            {"batch_size": 1, "devices": 4, "shards": 4},
            "plain (kernels would move 0.26 times the bytes in 2 more kernels per layer)",
        ),
    ],
)
def test_choice(setting, platform, change, expected):
    assert str(kv_cache.choose(setting, platform, USE._replace(**change))) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "dtype"), [(1, "float32"), (5, "float32"), (20, "float32"), (5, "int8"), (20, "int8")]
)
@pytest.mark.parametrize("platform", SIMULATED)
def test_each_device_has_its_own_heads(platform, tokens, dtype, mesh):
    """Fill, write and attend equal plain JAX on one device, also with more tokens than the kernels take."""
    rng = np.random.default_rng(tokens)

    def random(*shape):
        return rng.normal(size=shape).astype(np.float32)

    prompt, new, q = [random(2, 9, 4, 64)] * 2, [random(2, tokens, 4, 64) for _ in "kv"], random(2, tokens, 4, 2, 64)
    positions = np.array([9, 4], np.int32)

    def attended(name, sharding, q, prompt, new):
        cache = kv_cache.init_layer_cache(2, 4, 80, 64, dtype, name, sharding)
        cache = kv_cache.write(kv_cache.fill(cache, *prompt), *new, positions)
        return kv_cache.attend(q, cache, positions), cache

    plain, held = jax.jit(lambda *inputs: attended("plain", None, *inputs))(q, prompt, new)
    heads = NamedSharding(mesh, PartitionSpec(None, None, "tensor"))
    inputs = jax.device_put((q, prompt, new), heads)
    with SIMULATED[platform]():
        program = jax.jit(lambda *inputs: attended(platform, kv_cache_sharding(mesh), *inputs)).lower(*inputs).compile()
        mixed, cache = program(*inputs)
        assert not SENT.search(program.as_text())
        for leaf in jax.tree.leaves(cache):
            assert {part.data.shape[1] for part in leaf.addressable_shards} == {2}
        np.testing.assert_allclose(mixed, plain, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(kv_cache.numbers(cache), kv_cache.numbers(held), strict=True):
            np.testing.assert_array_equal(ours[:, :, :80], theirs)


CONFIG = dataclasses.replace(TINY, num_layers=2, head_width=64, tie_embeddings=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "strategy", "numbers"),
    [
        ("tpu", SelfSpeculative(1, 2), "auto"),
        ("gpu", SelfSpeculative(1, 2), "auto"),
        ("gpu", Autoregressive(), "auto"),
        ("gpu", SelfSpeculative(1, 2), "int8"),
    ],
    ids=str,
)
def test_decoding_on_two_devices_gives_the_tokens_of_one(platform, strategy, numbers, mesh):
    """Runs prefill and the loop on prompts of several lengths."""
    params = random_params(CONFIG)
    tokens, lengths = np.zeros((2, 16), np.int32), np.array([3, 12], np.int32)
    for row, length in enumerate(lengths):
        tokens[row, :length] = np.random.default_rng(row).integers(1, 300, length)

    def decoded(name, params):
        weights = decoder_weights(params, jnp.float32)
        shape = DecodeShape(2, 16, 64, 16, 1, name, numbers)
        layout = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), weights)
        prefill, loop = (p.compile() for p in lower_decoding(layout, CONFIG, strategy, shape))
        limit, stop, pause = np.full(2, 8, np.int32), np.full((2, 1), -1, np.int32), Pause(np.int32(100), np.int32(1))
        state = prefill(weights, tokens, lengths, limit, stop, Greedy())
        assert {type(cache) is SplitCache for cache in state.cache} == {name != "plain"}
        return jax.tree.map(np.array, loop(weights, state, limit, stop, Greedy(), pause)._replace(cache=()))

    alone = decoded("plain", params)
    split = jax.device_put(params, tree_shardings(params, mesh))
    use = cache_use(split, CONFIG, strategy, DecodeShape(2, 16, 64, 16, 1))
    assert (use.devices, use.shards) == (2, 2)
    with SIMULATED[platform]():
        found = decoded(platform, split)
    assert (alone.emitted == 8).all()
    jax.tree.map(np.testing.assert_array_equal, found, alone)
