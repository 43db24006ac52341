"""Cross-entropy at several exits without ever holding the logits of more than one chunk of tokens."""

import functools

import jax
import jax.numpy as jnp

from lsjax.config import ModelConfig
from lsjax.data.batch import Batch
from lsjax.model.transformer import Params, exit_logits, scan_layers


def exit_loss_sums(
    params: Params,
    x: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    config: ModelConfig,
    chunk: int,
    teacher: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sums over all tokens: (CE(g(x), targets), KL(g(teacher) || g(x))), float32.

    x and teacher [B,S,D] are hidden states, targets and weights [B,S]. The teacher's side carries no gradient;
    without one the divergence is 0. Logits exist for `chunk` tokens at a time, forward and backward (they are
    recomputed there).
    """

    @jax.checkpoint
    def chunk_sums(x, targets, weights, teacher):
        logits = exit_logits(params, x, config)
        log_normalizer = jax.nn.logsumexp(logits, axis=-1)
        # A masked sum, not a gather: it stays local when the vocabulary is sharded, and its gradient is no scatter.
        hit = jnp.arange(logits.shape[-1]) == targets[..., None]
        target_logit = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        cross_entropy = jnp.sum((log_normalizer - target_logit) * weights)
        if teacher is None:
            return cross_entropy, jnp.float32(0.0)
        wanted = jax.lax.stop_gradient(jax.nn.log_softmax(exit_logits(params, teacher, config)))
        divergence = jnp.sum(jnp.exp(wanted) * (wanted - logits), axis=-1) + log_normalizer
        return cross_entropy, jnp.sum(divergence * weights)

    add = lambda total, piece: (jax.tree.map(jnp.add, total, chunk_sums(*piece)), None)  # noqa: E731
    zero = (jnp.float32(0.0), jnp.float32(0.0))
    return jax.lax.scan(add, zero, split_tokens((x, targets, weights, teacher), chunk))[0]


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
    distillation: float = 0.0,
    loss_chunk: int = 1024,
    rematerialize: bool = False,
    unroll: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """J of Eq. 5, summed over tokens: (sum_l w(l) (CE_l + distillation * KL_l), CE_l [L]), over batch.weights.

    exit_weights and exit_active [L] are data: a curriculum never recompiles, and an inactive exit costs
    nothing (`lax.cond`). Index l reads the state after layer l. With distillation the states of all layers are
    kept until the last one is known; without, each exit's loss is taken inside the layer scan.
    """

    def exit_loss(x, weight, active, teacher=None):
        sums = lambda x, teacher: exit_loss_sums(  # noqa: E731
            params, x, batch.targets, batch.weights, config, loss_chunk, teacher
        )
        nothing = lambda x, teacher: (jnp.float32(0.0), jnp.float32(0.0))  # noqa: E731
        loss, divergence = jax.lax.cond(active, sums, nothing, x, teacher)
        return weight * (loss + distillation * divergence), loss

    run_layers = functools.partial(
        scan_layers,
        params,
        batch.tokens,
        config,
        layer_mask=layer_mask,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        rematerialize=rematerialize,
        unroll=unroll,
    )
    per_exit = (exit_weights, exit_active)
    if distillation:
        last, states = run_layers(read=lambda x, _: x)
        _, (weighted, losses) = jax.lax.scan(lambda _, a: (None, exit_loss(*a, last)), None, (states, *per_exit))
    else:
        _, (weighted, losses) = run_layers(per_layer=per_exit, read=lambda x, exits: exit_loss(x, *exits))
    return jnp.sum(weighted), jax.lax.stop_gradient(losses)
