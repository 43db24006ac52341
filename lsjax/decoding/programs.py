"""The two programs behind every strategy, prefill and the decoding loop, as functions of arrays."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsjax.config import ModelConfig
from lsjax.decoding.loops import ALL_ROUNDS, Decoding, autoregressive_loop, begin, self_speculative_loop
from lsjax.decoding.passes import Weights, init_cache, prefill
from lsjax.decoding.rules import Greedy, Rule
from lsjax.decoding.strategies import SelfSpeculative, Strategy, most_drafts
from lsjax.scale.sharding import decoding_shardings, mesh_of, replicated_like


class DecodeShape(NamedTuple):
    """Static sizes: rows B, tokens a prompt is padded to, cache entries C, tokens a row may write, stop tokens."""

    rows: int
    bucket: int
    capacity: int
    room: int
    stops: int


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
    limit, stop, rule, pause []) -> Decoding, the state donated. `rule` may be of arrays or of their descriptions.
    """
    everywhere, mesh = replicated_like(weights["embed"]), mesh_of(weights["embed"])
    int32 = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.int32, sharding=everywhere)  # noqa: E731
    first_token = functools.partial(_first_token, config=config, strategy=strategy, shape=shape)
    decode = functools.partial(_decode, config=config, strategy=strategy)
    rule = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), rule)
    inputs = (weights, int32(shape.rows, shape.bucket), int32(shape.rows), int32(), int32(shape.stops), rule)
    state = jax.eval_shape(first_token, *inputs)
    shardings = decoding_shardings(state, mesh) if mesh else None
    if shardings:
        state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)
    platforms = {"lowering_platforms": (platform,)} if platform else {}
    begun = jax.jit(first_token, out_shardings=shardings).trace(*inputs)
    arguments = (weights, state, int32(), int32(shape.stops), rule, int32())
    loop = jax.jit(decode, donate_argnums=1, out_shardings=shardings).trace(*arguments)
    return begun.lower(**platforms), loop.lower(**platforms)


def last_layer(config: ModelConfig, strategy: Strategy) -> int:
    """How many layers a token of the result has been through."""
    return strategy.exit_layer if strategy.name == "early_exit" else config.num_layers


def _first_token(weights, tokens, lengths, limit, stop, rule, *, config, strategy: Strategy, shape: DecodeShape):
    cache = init_cache(config, shape.rows, shape.capacity, weights["embed"].dtype)
    logits, cache = prefill(weights, tokens, lengths, cache, config, range(last_layer(config, strategy)))
    first, _ = rule.choose(logits, jnp.zeros_like(lengths))
    prompts = tokens if getattr(strategy, "lookup", 0) else None
    return begin(cache, first, lengths, limit, stop, shape.room, most_drafts(strategy), prompts)


def _decode(weights, state: Decoding, limit, stop, rule, pause=ALL_ROUNDS, *, config: ModelConfig, strategy: Strategy):
    if isinstance(strategy, SelfSpeculative):
        drafting = strategy.exit_layer, strategy.num_speculations
        return self_speculative_loop(weights, state, limit, stop, config, *drafting, rule, pause, strategy.lookup)
    return autoregressive_loop(weights, state, limit, stop, config, last_layer(config, strategy), rule, pause)
