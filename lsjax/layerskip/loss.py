"""Cross-entropy at several exits without ever holding the logits of more than one chunk of tokens."""

import jax
import jax.numpy as jnp

from lsjax.config import ModelConfig
from lsjax.data.batch import Batch
from lsjax.model.transformer import Params, exit_logits, scan_layers


def cross_entropy_sum(
    params: Params, x: jax.Array, targets: jax.Array, weights: jax.Array, config: ModelConfig, chunk: int
) -> jax.Array:
    """sum of weights * CE(g(x), targets) over all tokens: x [B,S,D], targets and weights [B,S] -> float32.

    Logits exist for `chunk` tokens at a time, forward and backward (they are recomputed there).
    """

    @jax.checkpoint
    def chunk_loss(x, targets, weights):
        logits = exit_logits(params, x, config)
        log_normalizer = jax.nn.logsumexp(logits, axis=-1)
        # A masked sum, not a gather: it stays local when the vocabulary is sharded, and its gradient is no scatter.
        hit = jnp.arange(logits.shape[-1]) == targets[..., None]
        target_logit = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        return jnp.sum((log_normalizer - target_logit) * weights)

    add = lambda total, piece: (total + chunk_loss(*piece), None)  # noqa: E731
    return jax.lax.scan(add, jnp.float32(0.0), split_tokens((x, targets, weights), chunk))[0]


def split_tokens(arrays, chunk: int):
    """A tree of [B, S, ...] -> [pieces, B, S/pieces, ...], each piece at most `chunk` tokens if it can be.

    Only the sequence axis is cut, into equal parts: a sharded batch axis stays where it is.
    """
    batch, length = jax.tree.leaves(arrays)[0].shape[:2]
    wanted = min(length, -(-batch * length // chunk))
    pieces = next(n for n in range(wanted, length + 1) if length % n == 0)
    return jax.tree.map(lambda a: a.reshape(batch, pieces, -1, *a.shape[2:]).swapaxes(0, 1), arrays)


def multi_exit_loss(
    params: Params,
    batch: Batch,
    config: ModelConfig,
    *,
    exit_weights: jax.Array,
    exit_active: jax.Array,
    layer_mask: jax.Array | None = None,
    loss_chunk: int = 1024,
    rematerialize: bool = False,
    unroll: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """J of Eq. 5, summed over tokens: (sum_l w(l) CE_l, CE_l [L]), both sums over batch.weights.

    exit_weights and exit_active [L] are data: a curriculum never recompiles, and an inactive exit costs
    nothing (`lax.cond` in the layer scan). Index l reads the state after layer l.
    """

    def read(x, layer_inputs):
        weight, active = layer_inputs
        loss = jax.lax.cond(
            active,
            lambda x: cross_entropy_sum(params, x, batch.targets, batch.weights, config, loss_chunk),
            lambda x: jnp.float32(0.0),
            x,
        )
        return weight * loss, loss

    _, (weighted, losses) = scan_layers(
        params,
        batch.tokens,
        config,
        layer_mask=layer_mask,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        per_layer=(exit_weights, exit_active),
        read=read,
        rematerialize=rematerialize,
        unroll=unroll,
    )
    return jnp.sum(weighted), jax.lax.stop_gradient(losses)
