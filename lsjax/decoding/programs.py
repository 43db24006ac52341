"""The two programs behind every strategy, prefill and the decoding loop, as functions of arrays."""

import functools
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsjax.config import ModelConfig
from lsjax.decoding.loops import NEVER, Decoding, Pause, autoregressive_loop, begin, replace_row, self_speculative_loop
from lsjax.decoding.passes import Weights, cache_dtype, init_cache, prefill
from lsjax.decoding.rules import Greedy, Rule
from lsjax.decoding.strategies import AUTO, SelfSpeculative, Strategy, lookahead, most_drafts
from lsjax.scale.sharding import decoding_shardings, head_ways, mesh_of, replicated_like
from pallas_kernels.kv_cache import interface as kv_cache


class DecodeShape(NamedTuple):
    """Static sizes: rows B, tokens a prompt is padded to, cache entries C, tokens a row may write, stop tokens; by what
    the cache is written and read (a name of kv_cache.KERNELS); and what numbers it holds (of lsjax.load's caches)."""

    rows: int
    bucket: int
    capacity: int
    room: int
    stops: int
    kernels: str = kv_cache.PLAIN
    cache: str = AUTO


def choose_kernels(
    setting: str, weights: Weights, config: ModelConfig, strategy: Strategy, shape: DecodeShape, platform: str | None
) -> kv_cache.Kernels:
    """By what the cache of these programs is written and read: `setting` as of kv_cache.choose, `platform` that of this
    process if None. Where "on" cannot be, one line of the log says why."""
    chosen = kv_cache.choose(setting, platform or jax.default_backend(), cache_use(weights, config, strategy, shape))
    if setting == "on" and chosen.name == kv_cache.PLAIN:
        _warn_once(f"the KV cache is written and read by plain JAX: {chosen.reason}")
    return chosen


@functools.cache
def _warn_once(message: str) -> None:
    logging.warning(message)


def cache_use(weights: Weights, config: ModelConfig, strategy: Strategy, shape: DecodeShape) -> kv_cache.Use:
    mesh = mesh_of(weights["embed"])
    return kv_cache.Use(
        rows=shape.rows,
        num_kv_heads=config.num_kv_heads,
        head_width=config.head_width,
        capacity=shape.capacity,
        mean_length=min(shape.capacity, shape.bucket + shape.room // 2),
        tokens=lookahead(strategy),
        dtype=cache_dtype(weights, shape.cache),
        devices=mesh.size if mesh else 1,
        group=config.num_heads // config.num_kv_heads,
        parts=head_ways(mesh) if mesh else 1,
    )


def lower_decoding(
    weights: Weights,
    config: ModelConfig,
    strategy: Strategy,
    shape: DecodeShape,
    rule: Rule = Greedy(),  # noqa: B008 (immutable)
    platform: str | None = None,
) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
    """(prefill, decode), lowered for weights given as jax.ShapeDtypeStruct with their shardings, for the platform of
    this process or another ("tpu", "cuda").

    prefill (weights, tokens [B, bucket], lengths [B], limit [], stop [n], rule) -> Decoding; decode (weights, Decoding,
    limit, stop, rule, Pause) -> Decoding, the state donated. `rule` may be of arrays or of their descriptions.
    """
    begun, state, shardings = _begun(weights, config, strategy, shape, rule)
    decode = functools.partial(_decode, config=config, strategy=strategy)
    int32, rule = _int32(weights), _described(rule, weights)
    arguments = (weights, state, int32(), int32(shape.stops), rule, Pause(int32(), int32()))
    loop = jax.jit(decode, donate_argnums=1, out_shardings=shardings).trace(*arguments)
    return begun(platform), _lower(loop, platform)


def lower_refill(
    weights: Weights,
    config: ModelConfig,
    strategy: Strategy,
    shape: DecodeShape,
    rule: Rule = Greedy(),  # noqa: B008 (immutable)
    platform: str | None = None,
) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
    """(prefill of one row, replace), where a row that is done makes room for another prompt. replace (Decoding, row [],
    Decoding of one row) -> Decoding, the first donated."""
    one = jax.eval_shape(lambda rule: rule.of_rows([0]), _described(rule, weights))
    begun, new, _ = _begun(weights, config, strategy, shape._replace(rows=1), one)
    _, state, shardings = _begun(weights, config, strategy, shape, rule)
    replace = jax.jit(replace_row, donate_argnums=0, out_shardings=shardings).trace(state, _int32(weights)(), new)
    return begun(platform), _lower(replace, platform)


def _begun(weights, config, strategy, shape, rule):
    """(what lowers prefill for a platform, its Decoding described, with which shardings where there is a mesh)."""
    int32, mesh = _int32(weights), mesh_of(weights["embed"])
    first_token = functools.partial(_first_token, config=config, strategy=strategy, shape=shape, mesh=mesh)
    rule = _described(rule, weights)
    inputs = (weights, int32(shape.rows, shape.bucket), int32(shape.rows), int32(), int32(shape.stops), rule)
    state = jax.eval_shape(first_token, *inputs)
    shardings = decoding_shardings(state, mesh) if mesh else None
    if shardings:
        state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)
    prefill = jax.jit(first_token, out_shardings=shardings)
    return lambda platform: _lower(prefill.trace(*inputs), platform), state, shardings


def _int32(weights: Weights):
    everywhere = replicated_like(weights["embed"])
    return lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.int32, sharding=everywhere)


def _described(rule: Rule, weights: Weights) -> Rule:
    everywhere = replicated_like(weights["embed"])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), rule)


def _lower(traced: jax.stages.Traced, platform: str | None) -> jax.stages.Lowered:
    return traced.lower(lowering_platforms=(platform,)) if platform else traced.lower()


def last_layer(config: ModelConfig, strategy: Strategy) -> int:
    """How many layers a token of the result has been through."""
    return strategy.exit_layer if strategy.name == "early_exit" else config.num_layers


def _first_token(
    weights, tokens, lengths, limit, stop, rule, *, config, strategy: Strategy, shape: DecodeShape, mesh=None
):
    dtype = cache_dtype(weights, shape.cache)
    cache = init_cache(config, shape.rows, shape.capacity, dtype, shape.kernels, mesh)
    logits, cache = prefill(weights, tokens, lengths, cache, config, range(last_layer(config, strategy)))
    first, _ = rule.choose(logits, jnp.zeros_like(lengths))
    prompts = tokens if getattr(strategy, "lookup", 0) else None
    return begin(cache, first, lengths, limit, stop, shape.room, most_drafts(strategy), prompts)


def _decode(weights, state: Decoding, limit, stop, rule, pause=NEVER, *, config: ModelConfig, strategy: Strategy):
    if isinstance(strategy, SelfSpeculative):
        drafting = strategy.exit_layer, strategy.num_speculations
        return self_speculative_loop(weights, state, limit, stop, config, *drafting, rule, pause, strategy.lookup)
    return autoregressive_loop(weights, state, limit, stop, config, last_layer(config, strategy), rule, pause)
