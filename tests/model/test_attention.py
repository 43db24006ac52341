"""Every attention function against the formula in float64 numpy, and the choice between them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.config import MeshConfig
from lsjax.errors import UserError
from lsjax.model import attention as plain
from lsjax.model.attention import plain_attention
from lsjax.model.flash import choose_attention, splash_attention
from lsjax.parallel.sharding import make_mesh


def inputs(length, heads=2, group=2, width=8, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(batch, length, heads, group, width))
    k, v = rng.normal(size=(2, batch, length, heads, width))
    starts = rng.random((batch, length)) < 4 / length
    return q, k, v, np.cumsum(starts, axis=1).astype(np.int32)


def by_the_formula(q, k, v, segments):
    scores = np.einsum("bskgh,bckh->bkgsc", q, k) * q.shape[-1] ** -0.5
    visible = np.tril(np.ones(scores.shape[-2:], bool))
    if segments is not None:
        visible = visible & (segments[:, :, None] == segments[:, None, :])[:, None, None]
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bkgsc,bckh->bskgh", weights / weights.sum(-1, keepdims=True), v)


def check(attend, length, segmented, **shape):
    q, k, v, segments = inputs(length, **shape)
    segments = segments if segmented else None
    found = attend(*(jnp.asarray(a, jnp.float32) for a in (q, k, v)), segments)
    np.testing.assert_allclose(found, by_the_formula(q, k, v, segments), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("length", [5, 32, 100])
@pytest.mark.parametrize("long", [32, 1024])
def test_plain_attention_is_the_formula(monkeypatch, long, length, segmented):
    monkeypatch.setattr(plain, "_LONG", long)
    monkeypatch.setattr(plain, "_BLOCK", 24)  # 100 tokens: four blocks and a rest
    check(plain_attention, length, segmented)


@pytest.mark.parametrize("long", [16, 1024])
def test_blocks_have_the_gradient_of_the_whole(monkeypatch, long):
    q, k, v, segments = (jnp.asarray(a, jnp.float32) for a in inputs(80))

    def loss(q, k, v):
        return jnp.sum(jnp.sin(plain_attention(q, k, v, segments)))

    whole = jax.grad(loss, (0, 1, 2))(q, k, v)
    monkeypatch.setattr(plain, "_LONG", long)
    monkeypatch.setattr(plain, "_BLOCK", 32)
    for ours, theirs in zip(jax.grad(loss, (0, 1, 2))(q, k, v), whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_blocks_take_less_memory(monkeypatch):
    """Compares temporaries at 4,096 tokens, forward and backward.

    Four blocks would need a quarter, but XLA:CPU works on several blocks at a time.
    """
    shapes = [jax.ShapeDtypeStruct((1, 4096, 4, *rest), jnp.float32) for rest in ((2, 8), (8,), (8,))]

    def temporaries():
        gradient = jax.jit(jax.grad(lambda q, k, v: jnp.sum(plain_attention(q, k, v)), (0, 1, 2)))
        return gradient.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    blocks = temporaries()
    monkeypatch.setattr(plain, "_LONG", 4096)
    monkeypatch.setattr(plain, "_BLOCK", 4096)
    assert blocks < 0.7 * temporaries()


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("width", [64, 128])
def test_splash_attention_is_the_formula(segmented, width):
    """Runs the TPU kernel in interpret mode, with grouped heads."""
    check(functools.partial(splash_attention, interpret=True), 256, segmented, width=width, batch=1)


def test_splash_attention_has_the_gradient_of_plain_attention():
    q, k, v, segments = (jnp.asarray(a, jnp.float32) for a in inputs(128, width=64, batch=1))

    def gradient(attend):
        return jax.grad(lambda q, k, v: jnp.sum(jnp.sin(attend(q, k, v, segments))), (0, 1, 2))(q, k, v)

    for ours, theirs in zip(
        gradient(functools.partial(splash_attention, interpret=True)), gradient(plain_attention), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-4)


def test_splash_attention_on_a_mesh_runs_each_devices_rows_and_heads():
    q, k, v, segments = inputs(128, width=64, batch=2)
    with jax.set_mesh(make_mesh(MeshConfig(2, 1, 2), jax.devices()[:4])):
        attend = jax.jit(functools.partial(splash_attention, interpret=True))
        found = attend(*(jnp.asarray(a, jnp.float32) for a in (q, k, v)), segments)
    assert found.addressable_shards[0].data.shape == (1, 128, 1, 2, 64)
    np.testing.assert_allclose(found, by_the_formula(q, k, v, segments), rtol=1e-4, atol=1e-4)


def test_the_choice_says_why():
    choose = functools.partial(choose_attention, head_width=128)
    assert choose("auto", "tpu", jnp.bfloat16, length=4096).name == "splash"
    assert choose("plain", "tpu", jnp.bfloat16, length=4096).name == "plain"
    short = choose("auto", "tpu", jnp.bfloat16, length=100)
    assert short.name == "plain"
    assert "multiple of 128 tokens, not 100" in short.reason
    assert "bfloat16, not float32" in choose("auto", "gpu", jnp.dtype("float32"), length=4096).reason
    with pytest.raises(UserError, match=r"config.training.attention is flash, but there is no flash attention for cpu"):
        choose("flash", "cpu", jnp.float32, length=4096)
