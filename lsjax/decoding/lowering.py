"""Lowering: every strategy becomes two programs of arrays, prefill and the decoding loop."""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lsjax.config import ModelConfig
from lsjax.decoding.forward import Weights, cache_dtype, init_cache, prefill
from lsjax.decoding.loops import (
    GREEDY,
    NEVER,
    DecodeState,
    Pause,
    autoregressive_loop,
    begin,
    replace_sequence,
    self_speculative_loop,
)
from lsjax.decoding.sampling import Sampler
from lsjax.decoding.shardings import decode_state_shardings, kv_head_shards
from lsjax.decoding.strategies import AUTO, SelfSpeculative, Strategy
from lsjax.parallel.sharding import mesh_of, replicated_like
from pallas_kernels.kv_cache import interface as kv_cache


class DecodeShape(NamedTuple):
    """Static sizes of the programs of a batch.

    batch_size: B, the sequences decoded side by side.
    padded_prompt_length: tokens that every prompt is padded to.
    capacity: C, cache entries per sequence.
    buffer_size: room for new tokens per sequence.
    num_stop_tokens: length of the list of stop tokens of a sequence.
    kernels: the name in kv_cache.KERNELS of what writes and reads the cache.
    cache: "auto" or "int8", the cache's numbers (lsjax.load).
    """

    batch_size: int
    padded_prompt_length: int
    capacity: int
    buffer_size: int
    num_stop_tokens: int
    kernels: str = kv_cache.PLAIN
    cache: str = AUTO


def choose_kernels(
    setting: str, weights: Weights, config: ModelConfig, strategy: Strategy, shape: DecodeShape, platform: str | None
) -> kv_cache.Kernels:
    """Returns what writes and reads the KV cache of these programs.

    setting: "auto", "on" or "off" (kv_cache.choose). platform: None is the platform of this process. Logs one line
    when "on" is impossible.
    """
    chosen = kv_cache.choose(setting, platform or jax.default_backend(), cache_use(weights, config, strategy, shape))
    if setting == "on" and chosen.name == kv_cache.PLAIN:
        _warn_once(f"plain JAX writes and reads the KV cache: {chosen.reason}")
    return chosen


@functools.cache
def _warn_once(message: str) -> None:
    logging.warning(message)


def cache_use(weights: Weights, config: ModelConfig, strategy: Strategy, shape: DecodeShape) -> kv_cache.CacheUse:
    """Returns the sizes by which kernels for the KV cache are chosen."""
    mesh = mesh_of(weights["embed"])
    return kv_cache.CacheUse(
        batch_size=shape.batch_size,
        num_kv_heads=config.num_kv_heads,
        head_width=config.head_width,
        capacity=shape.capacity,
        mean_length=min(shape.capacity, shape.padded_prompt_length + shape.buffer_size // 2),
        tokens=strategy.tokens_per_pass,
        dtype=cache_dtype(weights, shape.cache),
        devices=mesh.size if mesh else 1,
        group=config.num_heads // config.num_kv_heads,
        shards=kv_head_shards(mesh) if mesh else 1,
    )


def lower_decoding(
    weights: Weights,
    config: ModelConfig,
    strategy: Strategy,
    shape: DecodeShape,
    sampler: Sampler = GREEDY,
    platform: str | None = None,
) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
    """Lowers (prefill, decode) of a strategy.

    weights: arrays or jax.ShapeDtypeStruct with shardings. sampler: of arrays or of their descriptions.
    platform: "tpu", "cuda", ...; None is the platform of this process.

    prefill(weights, tokens [B, padded_prompt_length], lengths [B], max_new_tokens [B], stop_token_ids [B, n], sampler)
      -> DecodeState
    decode(weights, DecodeState, max_new_tokens [B], stop_token_ids [B, n], sampler, Pause) -> DecodeState; the state's
      buffers are donated.
    """
    lower_prefill, state, shardings = _prefill_program(weights, config, strategy, shape, sampler)
    decode = functools.partial(_decode, config=config, strategy=strategy)
    int32, sampler = _int32(weights), _described(sampler, weights)
    limits, stops = int32(shape.batch_size), int32(shape.batch_size, shape.num_stop_tokens)
    pause = jax.tree.map(lambda _: int32(), NEVER)
    arguments = (weights, state, limits, stops, sampler, pause)
    loop = jax.jit(decode, donate_argnums=1, out_shardings=shardings).trace(*arguments)
    return lower_prefill(platform), _lower(loop, platform)


def lower_refill(
    weights: Weights,
    config: ModelConfig,
    strategy: Strategy,
    shape: DecodeShape,
    sampler: Sampler = GREEDY,
    platform: str | None = None,
) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
    """Lowers (prefill of one sequence, replace), by which a waiting prompt takes the place of a finished sequence.

    replace(DecodeState, index [], DecodeState of one sequence) -> DecodeState; the first state is donated.
    """
    one = jax.eval_shape(lambda sampler: sampler.take([0]), _described(sampler, weights))
    lower_prefill, new, _ = _prefill_program(weights, config, strategy, shape._replace(batch_size=1), one)
    _, state, shardings = _prefill_program(weights, config, strategy, shape, sampler)
    replace = jax.jit(replace_sequence, donate_argnums=0, out_shardings=shardings).trace(state, _int32(weights)(), new)
    return lower_prefill(platform), _lower(replace, platform)


def _prefill_program(
    weights: Weights, config: ModelConfig, strategy: Strategy, shape: DecodeShape, sampler: Sampler
) -> tuple[Callable[[str | None], jax.stages.Lowered], DecodeState, DecodeState | None]:
    """Returns (a function that lowers prefill for a platform, its result described, the result's shardings)."""
    int32, mesh = _int32(weights), mesh_of(weights["embed"])
    first_token = functools.partial(_first_token, config=config, strategy=strategy, shape=shape, mesh=mesh)
    inputs = (
        weights,
        int32(shape.batch_size, shape.padded_prompt_length),
        int32(shape.batch_size),
        int32(shape.batch_size),
        int32(shape.batch_size, shape.num_stop_tokens),
        _described(sampler, weights),
    )
    state = jax.eval_shape(first_token, *inputs)
    shardings = decode_state_shardings(state, mesh) if mesh else None
    if shardings:
        state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)
    program = jax.jit(first_token, out_shardings=shardings)
    return lambda platform: _lower(program.trace(*inputs), platform), state, shardings


def _int32(weights: Weights) -> Callable[..., jax.ShapeDtypeStruct]:
    """Returns a function that describes an int32 array of some sizes, replicated over the weights' devices."""
    everywhere = replicated_like(weights["embed"])
    return lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.int32, sharding=everywhere)


def _described(sampler: Sampler, weights: Weights) -> Sampler:
    """Returns the sampler with descriptions of its arrays, replicated over the weights' devices."""
    everywhere = replicated_like(weights["embed"])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), sampler)


def _lower(traced: jax.stages.Traced, platform: str | None) -> jax.stages.Lowered:
    return traced.lower(lowering_platforms=(platform,)) if platform else traced.lower()


def _first_token(
    weights: Weights,
    tokens: jax.Array,
    lengths: jax.Array,
    max_new_tokens: jax.Array,
    stop_token_ids: jax.Array,
    sampler: Sampler,
    *,
    config: ModelConfig,
    strategy: Strategy,
    shape: DecodeShape,
    mesh: Mesh | None = None,
) -> DecodeState:
    """Reads the prompts and chooses each sequence's first new token."""
    dtype = cache_dtype(weights, shape.cache)
    cache = init_cache(config, shape.batch_size, shape.capacity, dtype, shape.kernels, mesh)
    layers = range(strategy.layers_run(config.num_layers))
    logits, cache = prefill(weights, tokens, lengths, cache, config, layers)
    first, _ = sampler.choose(logits, jnp.zeros_like(lengths))
    return begin(
        cache,
        first,
        lengths,
        max_new_tokens,
        stop_token_ids,
        buffer_size=shape.buffer_size,
        max_drafts=strategy.max_drafts,
        prompts=tokens if strategy.lookup else None,
    )


def _decode(
    weights: Weights,
    state: DecodeState,
    max_new_tokens: jax.Array,
    stop_token_ids: jax.Array,
    sampler: Sampler,
    pause: Pause = NEVER,
    *,
    config: ModelConfig,
    strategy: Strategy,
) -> DecodeState:
    """Runs the loop of a strategy."""
    if isinstance(strategy, SelfSpeculative):
        return self_speculative_loop(
            weights,
            state,
            max_new_tokens,
            stop_token_ids,
            config,
            exit_layer=int(strategy.exit_layer),
            num_speculations=int(strategy.num_speculations),
            sampler=sampler,
            pause=pause,
            lookup=strategy.lookup,
        )
    exit_layer = strategy.layers_run(config.num_layers)
    return autoregressive_loop(weights, state, max_new_tokens, stop_token_ids, config, exit_layer, sampler, pause)
