"""The modules of a Llama layer in functional Flax: RMSNorm, Attention, SwiGLU, DecoderLayer.

They are used only through `init` and `apply`. Projections that read the same input share one weight, because fewer,
larger matmuls are faster everywhere, most of all when decoding one token: q, k and v lie together per KV head (so that
a tensor mesh axis splits them without communication), and so do the gate and up projections of SwiGLU.

The module `Attention` owns the weights; how queries and keys mix is the `attend` argument (attention.py and flash.py
in training, the KV cache in decoding).
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from lsjax.config import ModelConfig
from lsjax.model.lora import LoraWeight
from lsjax.model.matmul import LaidOut, matmul
from lsjax.model.rematerialize import keep
from lsjax.model.rope import rotate

# attend(q [B,S,K,G,H], k [B,S,K,H], v [B,S,K,H]) -> (mixed [B,S,K,G,H], state), G = N/K query heads per KV head.
# `state` passes through to the caller, such as the layer's updated KV cache; None in training.
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, object]]

_INIT_STDDEV = 0.02


class RMSNorm(nn.Module):
    """Root-mean-square norm: x / rms(x) * scale over the last axis, computed in float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * scale).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention. The caller's `attend` decides what the queries see: a causal block or a KV cache."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, cos_sin: tuple[jax.Array, jax.Array], attend: Attend) -> tuple[jax.Array, object]:
        c = self.config
        group = c.num_heads // c.num_kv_heads
        init = nn.initializers.normal(_INIT_STDDEV)
        kernel = _weight(self, "qkv", init, (c.width, c.num_kv_heads, group + 2, c.head_width))
        qkv = keep(matmul(x, kernel), "qkv")
        # The gradient of `split` is one concatenation; that of slices would be a sum of padded arrays.
        q, k, v = jax.lax.split(qkv, (group, 1, 1), axis=3)
        k, v = k[..., 0, :], v[..., 0, :]
        mixed, state = attend(rotate(q, cos_sin), rotate(k, cos_sin), v)
        out = _weight(self, "output", _residual_init(c), (c.num_kv_heads, group, c.head_width, c.width))
        mixed = keep(mixed, "attention")
        return keep(matmul(mixed, out, axes=3), "attention_output"), state


class SwiGLU(nn.Module):
    """The gated feed-forward block: down(silu(gate(x)) * up(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        init = nn.initializers.normal(_INIT_STDDEV)
        kernel = _weight(self, "gate_up", init, (c.width, 2, c.feed_forward_width))
        # Marked one by one: kept as one array, XLA:TPU copies both into another layout in the backward pass.
        halves = jax.lax.split(matmul(x, kernel), (1, 1), axis=2)
        gate, up = (keep(half[..., 0, :], "gate_up") for half in halves)
        down = _weight(self, "down", _residual_init(c), (c.feed_forward_width, c.width))
        return matmul(nn.silu(gate) * up, down)


class DecoderLayer(nn.Module):
    """One layer's update f_l of Eq. 1: what attention and feed-forward together add to the layer's input."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, cos_sin: tuple[jax.Array, jax.Array], attend: Attend) -> tuple[jax.Array, object]:
        """Returns f_l(x) [B,S,D] for x [B,S,D], and the state of `attend`. The next hidden state is x + f_l(x)."""
        c = self.config
        normed = RMSNorm(c.rms_norm_epsilon, name="attention_norm")(x)
        attended, state = Attention(c, name="attention")(normed, cos_sin, attend)
        normed = RMSNorm(c.rms_norm_epsilon, name="feed_forward_norm")(x + attended)
        return attended + SwiGLU(c, name="feed_forward")(normed), state


def _weight(module: nn.Module, name: str, init, shape: tuple[int, ...]):
    """Returns the module's parameter. Weights that decoding laid out or quantised, or with LoRA, are unchanged."""
    if module.has_variable("params", name) and isinstance(module.get_variable("params", name), LaidOut | LoraWeight):
        return module.get_variable("params", name)
    return module.param(name, init, shape)


def _residual_init(config: ModelConfig):
    """Initialises projections into the residual stream, smaller in deeper models (GPT-2, section 2.3)."""
    return nn.initializers.normal(_INIT_STDDEV / (2 * config.num_layers) ** 0.5)
