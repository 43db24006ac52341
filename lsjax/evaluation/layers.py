"""The prediction of every exit at every position of one text, from one pass over it (the paper's Figure 2)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.config import ModelConfig
from lsjax.layerskip.chunked import split_tokens
from lsjax.model.attention import plain_attention
from lsjax.model.exit_adapter import ExitAdapter
from lsjax.model.rope import rotation
from lsjax.model.transformer import apply_layer, exit_logits
from pallas_kernels.kv_cache.reference import int8_round_trip

CHUNK = 128  # positions whose logits exist at once: 66 MB for a vocabulary of 128k


@functools.partial(jax.jit, static_argnames=("config", "int8_cache", "chunk"))
def predict_layers(
    weights: dict[str, Any],
    tokens: jax.Array,
    config: ModelConfig,
    int8_cache: bool = False,
    chunk: int = CHUNK,
    exit_adapter: ExitAdapter | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the likeliest next token of every exit at every position, and its probability: int32, float32 [L,S].

    weights: parameters with `layers` as a tuple of L layers, in any layout of weights: those that decoding reads.
    tokens: one text [S]. Tokens at its end, such as padding, change nothing before them.
    int8_cache: rounds keys and values as an int8 cache does.
    chunk: positions whose logits exist at once. Each exit reads its state in chunks before the next layer runs.
    exit_adapter: what its exit predicts goes through it, as in decoding.

    Entry l is exit layer l+1. Probabilities are a float32 softmax over the whole vocabulary.
    """
    cos_sin = rotation(jnp.arange(tokens.shape[0])[None], config)

    def attend(q, k, v):
        k, v = int8_round_trip(k, v) if int8_cache else (k, v)
        return plain_attention(q, k, v), None

    def read_chunk(x):
        logits = exit_logits(weights, x, config)
        probability = jnp.exp(jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1))
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), probability

    x = weights["embed"][tokens[None]]
    seen = []
    for exit_layer, layer in enumerate(weights["layers"], 1):
        x, _ = apply_layer(layer, x, cos_sin, attend, config)
        adapter = exit_adapter if exit_adapter is not None and exit_adapter.exit_layer == exit_layer else None
        seen.append(jax.lax.map(read_chunk, split_tokens(adapter.apply(x) if adapter else x, chunk)))
    predicted, probabilities = (jnp.stack(arrays).reshape(len(seen), -1) for arrays in zip(*seen, strict=True))
    return predicted, probabilities


def settling_layers(predicted: np.ndarray) -> np.ndarray:
    """Returns the exit layer from which each prediction stays the same up to the last layer, int [S], in 1..L.

    predicted: tokens [L,S], entry l by exit layer l+1.
    """
    same = predicted == predicted[-1]
    unchanged = np.cumprod(same[::-1], axis=0).sum(axis=0)  # layers at the end that agree with the last one
    return len(predicted) - unchanged + 1
