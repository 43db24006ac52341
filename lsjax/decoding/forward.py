"""Forward passes for decoding: a few tokens through a range of layers, against the KV cache; and prefill."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lsjax.config import ModelConfig
from lsjax.decoding.shardings import decoder_weight_shardings, kv_cache_sharding
from lsjax.model.attention import plain_attention
from lsjax.model.quantization import cast, states_in_int8
from lsjax.model.rope import rotation
from lsjax.model.transformer import Params, apply_layer, exit_logits
from lsjax.model.weight_layout import LeftOperand, OutputMajor, lay_out_weights
from lsjax.parallel.sharding import mesh_of
from pallas_kernels.kv_cache import interface as kv_cache

Weights = dict[str, Any]
Cache = tuple[kv_cache.LayerCache, ...]

DRAFT = "draft"  # the key of separate weights that only draft, beside the model's own: int8 layers, a shorter head
TOKEN_IDS = "token_ids"  # the key, among those, of the token ids [k] of a head with k rows, ascending
EXIT_ADAPTER = "exit_adapter"  # the key, among them or for an early exit's text, of the exit's ExitAdapter
CACHES = ("auto", "int8")  # settings for the numbers of the KV cache
PREFILL_CHUNK = 512  # longer prompts are read this many tokens at a time


def decoder_weights(params: Params, dtype: jnp.dtype, for_cpu: bool = False) -> Weights:
    """Lays parameters out for decoding: `layers` becomes a tuple of L trees with arrays of their own, in `dtype`.

    Layers inside one stacked array would be copied out of it at every step (XLA:CPU always, XLA:GPU in loops). The
    outputs of a weight become its rows (lsjax/model/weight_layout.py). for_cpu: weights also become the left operand,
    and those in int8 are multiplied by states in int8, unless they are split over a mesh.
    """
    mesh = mesh_of(params["embed"])
    layout = LeftOperand if for_cpu and mesh is None else OutputMajor

    def unstack(params):
        params = cast(params, dtype)
        layers = params["layers"]
        num_layers = jax.tree.leaves(layers)[0].shape[0]
        layers = tuple(jax.tree.map(operator.itemgetter(i), layers) for i in range(num_layers))
        return lay_out_weights(params | {"layers": layers}, layout)

    if mesh is None:
        return states_in_int8(unstack(params), rounded=layout is LeftOperand)
    shardings = decoder_weight_shardings(jax.eval_shape(unstack, params), mesh)
    return jax.jit(unstack, out_shardings=shardings)(params)


def cache_dtype(weights: Weights, cache: str) -> jnp.dtype:
    """Returns the KV-cache dtype; "auto" means the compute dtype."""
    return jnp.dtype("int8") if cache == "int8" else weights["embed"].dtype


def init_cache(
    config: ModelConfig,
    batch: int,
    capacity: int,
    dtype: jnp.dtype,
    kernels: str = kv_cache.PLAIN,
    mesh: Mesh | None = None,
) -> Cache:
    """Returns an empty cache of `capacity` tokens per sequence: one LayerCache per layer, with arrays of its own.

    mesh: the mesh that the model is split over, if any.
    """
    sharding = kv_cache_sharding(mesh) if mesh else None
    return tuple(
        kv_cache.init_layer_cache(
            batch, config.num_kv_heads, capacity, config.head_width, dtype=dtype, kernels=kernels, sharding=sharding
        )
        for _ in range(config.num_layers)
    )


def embed(weights: Weights, tokens: jax.Array) -> jax.Array:
    """Looks up the embeddings [B, T, D] of tokens [B, T]."""
    table = weights["embed"]
    if tokens.size == 1 and jax.typeof(table).sharding.mesh.size > 1:
        # XLA:GPU turns a single row into a slice, and each device then gathers the whole table that is split by rows.
        return table[jnp.repeat(tokens, 2, axis=1)][:, :1]
    return table[tokens]


def adapt(weights: Weights, x: jax.Array) -> jax.Array:
    """Applies the exit adapter among some weights to states [..., D] that the head reads next; returns x without one.

    The weights that verify never hold one.
    """
    return weights[EXIT_ADAPTER].apply(x) if EXIT_ADAPTER in weights else x


def run_layers(
    weights: Weights, x: jax.Array, cache: Cache, positions: jax.Array, layers: range, config: ModelConfig
) -> tuple[jax.Array, Cache]:
    """Runs states through some layers and writes their keys and values into the cache.

    x: [B, T, D]. positions: position of the first of the T tokens of each sequence [B].
    Returns (states after the last of these layers [B, T, D], the cache). The loop is unrolled; decoder_weights says
    why.
    """
    cos_sin = rotation(positions[:, None] + jnp.arange(x.shape[1]), config)
    caches = list(cache)
    for index in layers:

        def attend(q, k, v, old=caches[index]):
            written = kv_cache.write(old, k, v, positions)
            return kv_cache.attend(q, written, positions), written

        x, caches[index] = apply_layer(weights["layers"][index], x, cos_sin, attend, config)
    return x, tuple(caches)


def prefill(
    weights: Weights, tokens: jax.Array, lengths: jax.Array, cache: Cache, config: ModelConfig, layers: range
) -> tuple[jax.Array, Cache]:
    """Reads whole prompts through some layers.

    tokens: right-padded prompts [B, S]. lengths: their lengths [B].
    Returns (logits after each prompt [B, V], the cache).

    Padding is written to the cache too, but past each prompt's length, where nothing reads it. If the cache rounds, as
    int8 does, attention reads the rounded keys and values here too. So the last logits depend neither on the chunks in
    which a prompt is read nor on which of its tokens were generated.
    """
    batch, length = tokens.shape
    if length > PREFILL_CHUNK:
        return _prefill_by_chunks(weights, tokens, lengths, cache, config, layers)
    cos_sin = rotation(jnp.broadcast_to(jnp.arange(length), (batch, length)), config)
    x, caches = embed(weights, tokens), list(cache)
    for index in layers:

        def attend(q, k, v, old=caches[index]):
            return plain_attention(q, *kv_cache.as_read(old, k, v)), kv_cache.fill(old, k, v)

        x, caches[index] = apply_layer(weights["layers"][index], x, cos_sin, attend, config)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return exit_logits(weights, adapt(weights, last), config)[:, 0], tuple(caches)


def _prefill_by_chunks(
    weights: Weights, tokens: jax.Array, lengths: jax.Array, cache: Cache, config: ModelConfig, layers: range
) -> tuple[jax.Array, Cache]:
    """Reads prompts in chunks against the cache, so that memory holds the attention scores of one chunk at a time.

    Skips chunks past the longest prompt.
    """
    batch, length = tokens.shape
    chunk = PREFILL_CHUNK

    def read(index, carry):
        last, cache = carry
        # If chunks do not divide the length, the last one starts earlier and reads some tokens a second time.
        start = jnp.minimum(index * chunk, length - chunk)
        x = embed(weights, jax.lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1))
        x, cache = run_layers(weights, x, cache, jnp.full(batch, start), layers, config)
        at = lengths - 1 - start
        newest = jnp.take_along_axis(x, jnp.clip(at, 0, chunk - 1)[:, None, None], axis=1)
        return jnp.where(((at >= 0) & (at < chunk))[:, None, None], newest, last), cache

    nothing = jnp.zeros((batch, 1, weights["embed"].shape[1]), weights["embed"].dtype)
    last, cache = jax.lax.fori_loop(0, -(-jnp.max(lengths) // chunk), read, (nothing, cache))
    return exit_logits(weights, adapt(weights, last), config)[:, 0], cache
