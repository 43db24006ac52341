"""Which implementation of the KV cache is chosen, and that each does what plain JAX does."""

import dataclasses
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.decoding.forward import decoder_weights
from lsjax.decoding.loops import Pause
from lsjax.decoding.lowering import DecodeShape, choose_kernels, lower_decoding
from lsjax.decoding.sampling import Greedy
from lsjax.decoding.strategies import Autoregressive, SelfSpeculative
from pallas_kernels.kv_cache import gpu, tpu, triton_backend
from pallas_kernels.kv_cache import interface as kv_cache
from tests.conftest import TINY, random_params
from tests.helpers.interpreted import SIMULATED

FEWER_BUT_MORE = "kernels would move 0.92 times the bytes in 2 more kernels per layer"
USE = kv_cache.CacheUse(2, 8, 128, capacity=4096, mean_length=1024, tokens=5, dtype=jnp.bfloat16)


@pytest.mark.parametrize(
    ("setting", "platform", "change", "expected"),
    [
        ("auto", "tpu", {}, "tpu"),
        ("auto", "tpu", {"dtype": jnp.int8}, "tpu"),
        ("on", "gpu", {"dtype": jnp.int8, "head_width": 32}, "gpu"),
        # One sequence: in int8, plain JAX starts more kernels than the kernels do.
        ("auto", "gpu", {"dtype": jnp.int8, "batch_size": 1, "capacity": 1152}, "gpu"),
        (
            "auto",
            "tpu",
            {"dtype": jnp.int8, "capacity": 1024, "mean_length": 1020},
            "plain (kernels would move 1.13 times the bytes)",
        ),
        ("on", "tpu", {}, "tpu"),
        ("off", "tpu", {}, "plain (kernels are off)"),
        ("on", "cpu", {}, "plain (no kernels for cpu)"),
        ("auto", "gpu", {}, "gpu"),
        ("on", "gpu", {}, "gpu"),
        ("on", "gpu", {"head_width": 96}, "plain (no GPU kernels for head width 96, only for 32, 64, 128)"),
        ("on", "gpu", {"tokens": 17}, "plain (no GPU kernels for 17 tokens per pass, only for up to 16)"),
        (
            "on",
            "gpu",
            {"tokens": 9, "group": 9},
            "plain (no GPU kernels for 9 tokens per pass with 9 query heads per KV head)",
        ),
        (
            "on",
            "gpu",
            {"dtype": jnp.float16},
            "plain (no GPU kernels for float16, only for float32, bfloat16 and int8)",
        ),
        # One sequence: two more kernels per layer, to save 128 empty entries, or 3,072.
        (
            "auto",
            "gpu",
            {"batch_size": 1, "capacity": 1152},
            "plain (kernels would move 0.92 times the bytes in 2 more kernels per layer)",
        ),
        ("auto", "gpu", {"batch_size": 1, "capacity": 4096}, "gpu"),
        # Nearly full: the partial results of the splits are more than the entries that are not read.
        ("auto", "gpu", {"capacity": 1024, "mean_length": 1020}, "plain (kernels would move 1.04 times the bytes)"),
        ("on", "tpu", {"head_width": 96}, "plain (no TPU kernels for head width 96, only for multiples of 64)"),
        ("on", "tpu", {"tokens": 17}, "plain (no TPU kernels for 17 tokens per pass, only for up to 16)"),
        (
            "on",
            "tpu",
            {"dtype": jnp.float16},
            "plain (no TPU kernels for float16, only for float32, bfloat16 and int8)",
        ),
        # Short, or nearly full: reading whole blocks saves nothing.
        ("auto", "tpu", {"capacity": 128, "mean_length": 100}, "plain (kernels would move 2.41 times the bytes)"),
        ("on", "tpu", {"capacity": 128, "mean_length": 100}, "tpu"),
        ("auto", "tpu", {"capacity": 1024, "mean_length": 1020}, "plain (kernels would move 1.06 times the bytes)"),
    ],
)
def test_choice(setting, platform, change, expected):
    assert str(kv_cache.choose(setting, platform, USE._replace(**change))) == expected


def test_bytes():
    """Counted by hand: 2 sequences x 8 heads x (1024 entries + twice 2 tiles of 16) x 2 x 128 numbers of 2 bytes."""
    assert sum(tpu.bytes_moved(USE)) == 2 * 8 * (1024 + 2 * 32) * 2 * 128 * 2
    assert sum(tpu.bytes_moved(USE._replace(mean_length=1025))) == 2 * 8 * (1280 + 2 * 32) * 2 * 128 * 2


def test_bytes_in_int8():
    """Counted as above, with 2 x 128 numbers of one byte and 2 scales of 4 bytes per entry.

    On TPU, 5 tokens may touch 2 tiles of 32 entries (128 for scales), read and written back, and the capacity is a
    multiple of a tile of scales.
    """
    use = USE._replace(dtype=jnp.int8)
    entry = 2 * 8 * (2 * 128 + 2 * 4)
    assert kv_cache.KERNELS["plain"].bytes_moved(use) == (5 * entry, 4096 * entry)
    assert tpu.bytes_moved(use) == (2 * 8 * 2 * (64 * 2 * 128 + 256 * 2 * 4), 1024 * entry)
    assert tpu.entries_read(use._replace(capacity=1030, mean_length=1030)) == 1152
    assert tpu.entries_read(USE._replace(capacity=1030, mean_length=1030)) == 1056
    assert gpu.bytes_moved(use) == (5 * entry, 1024 * entry + 2 * 8 * 2 * 4 * 5 * (128 + 2) * 4)


def test_bytes_on_gpu():
    """Counted by hand: 2 sequences x 8 heads x (1024 + 5) entries of 2 x 128 numbers of 2 bytes.

    To these come the partial results, written and read: 4 splits x 5 tokens x 3 heads x (128 values, a maximum and a
    sum) in float32.
    """
    moved = 2 * 8 * (1024 + 5) * 2 * 128 * 2 + 2 * 2 * 8 * 4 * 5 * 3 * (128 + 2) * 4
    assert sum(gpu.bytes_moved(USE._replace(group=3))) == moved
    assert gpu.entries_read(USE) == 1024


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ("8.0", None),
        ("9.0", None),
        ("7.5", "no GPU kernels for compute capability 7.5, only for 8.0 and 9.0"),
        ("gfx942", "no GPU kernels for compute capability gfx942, only for 8.0 and 9.0"),
    ],
)
def test_only_gpus_that_the_kernels_were_compiled_for(monkeypatch, capability, reason):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    assert gpu.unsupported_reason(USE) == reason


def test_a_jax_without_pallas_for_triton_has_no_gpu_kernels(monkeypatch):
    monkeypatch.setattr(triton_backend, "triton", None)
    assert gpu.unsupported_reason(USE) == f"no GPU kernels in jax {jax.__version__}, which has no Pallas for Triton"


def test_unsupported_kernels_are_reported_once(caplog):
    weights = decoder_weights(random_params(TINY), jnp.float32)
    shape = DecodeShape(1, 16, 64, 32, 1)
    with caplog.at_level(logging.WARNING):
        for setting in ("off", "auto"):
            choose_kernels(setting, weights, TINY, Autoregressive(), shape, "tpu")
        assert not caplog.records
        for _ in range(2):
            assert choose_kernels("on", weights, TINY, Autoregressive(), shape, "tpu").name == kv_cache.PLAIN
    (record,) = caplog.records
    assert record.getMessage().endswith("no TPU kernels for head width 8, only for multiples of 64")


@pytest.mark.parametrize("tokens", [1, 5, 20])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("platform", SIMULATED)
def test_the_same_cache_by_either(platform, dtype, tokens):
    """Filled, written and attended to; with more tokens than the kernels take, too."""
    rng = np.random.default_rng(tokens)

    def random(*shape):
        return rng.normal(size=shape).astype(np.float32)

    prompt, new, q = [random(2, 9, 3, 64)] * 2, [random(2, tokens, 3, 64) for _ in "kv"], random(2, tokens, 3, 2, 64)
    new[1][1, -1, 0, 3] = np.inf  # a value that overflowed is 0
    positions = np.array([9, 4], np.int32)

    def attended(name):
        cache = kv_cache.init_layer_cache(2, 3, 80, 64, dtype, name)
        cache = kv_cache.write(kv_cache.fill(cache, *prompt), *new, positions)
        return kv_cache.attend(q, cache, positions), cache

    plain, held = jax.jit(lambda: attended("plain"))()
    with SIMULATED[platform]():
        mixed, cache = jax.jit(lambda: attended(platform))()
        np.testing.assert_allclose(mixed, plain, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(kv_cache.numbers(cache), kv_cache.numbers(held), strict=True):
            np.testing.assert_array_equal(ours[:, :, :80], theirs)


DRAFTING = SelfSpeculative(1, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "strategy", "cache"),
    [
        ("tpu", Autoregressive(), "auto"),
        ("tpu", DRAFTING, "auto"),
        ("gpu", DRAFTING, "auto"),
        ("tpu", DRAFTING, "int8"),
        ("gpu", Autoregressive(), "int8"),
    ],
    ids=str,
)
def test_decoding_by_either_gives_the_same_tokens(platform, strategy, cache):
    """Runs prefill and the loop on prompts of several lengths, kernels simulated (other tests look for races)."""
    config = dataclasses.replace(TINY, num_layers=2, head_width=64, tie_embeddings=False)
    weights = decoder_weights(random_params(config), jnp.float32)
    tokens = np.zeros((2, 16), np.int32)
    lengths = np.array([3, 12], np.int32)
    for row, length in enumerate(lengths):
        tokens[row, :length] = np.random.default_rng(row).integers(1, 300, length)

    def decoded(name):
        shape = DecodeShape(2, 16, 64, 16, 1, name, cache)
        prefill, loop = (p.compile() for p in lower_decoding(weights, config, strategy, shape))
        limit, stop, pause = jnp.full(2, 8), jnp.full((2, 1), -1), Pause(jnp.int32(100), jnp.int32(1))
        state = prefill(weights, tokens, lengths, limit, stop, Greedy())
        return jax.tree.map(np.array, loop(weights, state, limit, stop, Greedy(), pause)._replace(cache=()))

    plain = decoded("plain")
    with SIMULATED[platform]():
        kernels = decoded(platform)
    assert (plain.emitted == 8).all()
    jax.tree.map(np.testing.assert_array_equal, kernels, plain)
