"""Passes of a few tokens through a range of layers, against the KV cache."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lsjax.config import ModelConfig
from lsjax.model.attention import plain_attention
from lsjax.model.output_major import LeftOperand, OutputMajor, with_output_major
from lsjax.model.quantized import cast
from lsjax.model.rope import rotation
from lsjax.model.transformer import Params, apply_layer, exit_logits
from lsjax.scale.sharding import cache_sharding, decoder_shardings, mesh_of
from pallas_kernels.kv_cache import interface as kv_cache

Weights = dict[str, Any]
Cache = tuple[kv_cache.LayerCache, ...]

DRAFT = "draft"  # the key of weights that only draft, where they are others than the first layers' own
CACHES = ("auto", "int8")  # settings of what numbers the KV cache holds
PREFILL_CHUNK = 512  # tokens of longer prompts read at a time


def decoder_weights(params: Params, dtype: jnp.dtype, for_cpu: bool = False) -> Weights:
    """Parameters for decoding: `layers` is a tuple of L trees, each layer's arrays its own, in `dtype`.

    Layers inside one stacked array would be copied out of it at every step (XLA:CPU always, XLA:GPU in loops).
    Their outputs are rows (lsjax/model/output_major.py); for_cpu: and stand on the left, if not split over a mesh.
    """
    mesh = mesh_of(params["embed"])
    layout = LeftOperand if for_cpu and mesh is None else OutputMajor

    def unstack(params):
        params = cast(params, dtype)
        layers = params["layers"]
        num_layers = jax.tree.leaves(layers)[0].shape[0]
        layers = tuple(jax.tree.map(operator.itemgetter(i), layers) for i in range(num_layers))
        return with_output_major(params | {"layers": layers}, layout)

    if mesh is None:
        return unstack(params)
    shardings = decoder_shardings(jax.eval_shape(unstack, params), mesh)
    return jax.jit(unstack, out_shardings=shardings)(params)


def cache_dtype(weights: Weights, cache: str) -> jnp.dtype:
    """Of the KV cache: "auto" is the type that is computed with."""
    return jnp.dtype("int8") if cache == "int8" else weights["embed"].dtype


def init_cache(
    config: ModelConfig,
    batch: int,
    capacity: int,
    dtype: jnp.dtype,
    kernels: str = kv_cache.PLAIN,
    mesh: Mesh | None = None,
) -> Cache:
    """An empty cache of `capacity` tokens a row, one LayerCache a layer, each its own array; for a model that is split
    over `mesh`, where there is one."""
    sizes = batch, config.num_kv_heads, capacity, config.head_width
    sharding = cache_sharding(mesh) if mesh else None
    return tuple(kv_cache.init_layer_cache(*sizes, dtype, kernels, sharding) for _ in range(config.num_layers))


def embed(weights: Weights, tokens: jax.Array) -> jax.Array:
    """tokens [B, T] -> [B, T, D]."""
    table = weights["embed"]
    if tokens.size == 1 and jax.typeof(table).sharding.mesh.size > 1:
        # A lone row is a slice to XLA:GPU, for which each device would gather all of a table that is split by rows.
        return table[jnp.repeat(tokens, 2, axis=1)][:, :1]
    return table[tokens]


def run_layers(
    weights: Weights, x: jax.Array, cache: Cache, positions: jax.Array, layers: range, config: ModelConfig
) -> tuple[jax.Array, Cache]:
    """x [B, T, D], whose first token of row b stands at positions[b], through `layers`, writing their caches.

    Returns (states after the last of them [B, T, D], the cache). The loop is unrolled: see decoder_weights.
    """
    cos_sin = rotation(positions[:, None] + jnp.arange(x.shape[1]), config)
    cache = list(cache)
    for index in layers:

        def attend(q, k, v, old=cache[index]):
            written = kv_cache.write(old, k, v, positions)
            return kv_cache.attend(q, written, positions), written

        x, cache[index] = apply_layer(weights["layers"][index], x, cos_sin, attend, config)
    return x, tuple(cache)


def prefill(
    weights: Weights, tokens: jax.Array, lengths: jax.Array, cache: Cache, config: ModelConfig, layers: range
) -> tuple[jax.Array, Cache]:
    """Reads whole prompts: tokens [B, S], right-padded, of lengths [B]. Returns (logits after them [B, V], cache).

    Padding is written to the cache too, but past each row's length, where it is never read. What the cache rounds is
    attended to as rounded: a token then sees of the others what it would in any later pass, and a prompt's last logits
    depend neither on the chunks that it is read in nor on which of its tokens were generated.
    """
    batch, length = tokens.shape
    if length > PREFILL_CHUNK:
        return _prefill_by_chunks(weights, tokens, lengths, cache, config, layers)
    cos_sin = rotation(jnp.broadcast_to(jnp.arange(length), (batch, length)), config)
    x, cache = embed(weights, tokens), list(cache)
    for index in layers:

        def attend(q, k, v, old=cache[index]):
            return plain_attention(q, *kv_cache.as_read(old, k, v)), kv_cache.fill(old, k, v)

        x, cache[index] = apply_layer(weights["layers"][index], x, cos_sin, attend, config)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return exit_logits(weights, last, config)[:, 0], tuple(cache)


def _prefill_by_chunks(
    weights: Weights, tokens: jax.Array, lengths: jax.Array, cache: Cache, config: ModelConfig, layers: range
) -> tuple[jax.Array, Cache]:
    """One loop over chunks against the cache: beside it, a longer prompt needs no more memory than its scores of one
    chunk. Chunks past the longest prompt are left out."""
    batch, length = tokens.shape
    chunk = PREFILL_CHUNK

    def read(index, carry):
        last, cache = carry
        # Where chunks do not divide the length, the last one begins earlier and reads some tokens a second time.
        start = jnp.minimum(index * chunk, length - chunk)
        x = embed(weights, jax.lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1))
        x, cache = run_layers(weights, x, cache, jnp.full(batch, start), layers, config)
        at = lengths - 1 - start
        newest = jnp.take_along_axis(x, jnp.clip(at, 0, chunk - 1)[:, None, None], axis=1)
        return jnp.where(((at >= 0) & (at < chunk))[:, None, None], newest, last), cache

    nothing = jnp.zeros((batch, 1, weights["embed"].shape[1]), weights["embed"].dtype)
    last, cache = jax.lax.fori_loop(0, -(-jnp.max(lengths) // chunk), read, (nothing, cache))
    return exit_logits(weights, last, config)[:, 0], cache
