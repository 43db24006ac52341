"""The loss of an exit adapter on a model that stays as it is: how far its exit is from the last layer."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp

from lsjax.config import ModelConfig
from lsjax.data.batch import Batch
from lsjax.layerskip.chunked import exit_losses
from lsjax.layerskip.cross_entropy import Exits, Targets
from lsjax.layerskip.loss import every
from lsjax.model.attention import AttentionFunction, plain_attention
from lsjax.model.exit_adapter import ExitAdapter
from lsjax.model.transformer import Params, exit_and_last_states


def adapter_loss(
    adapter: ExitAdapter,
    params: Params,
    batch: Batch[jax.Array],
    config: ModelConfig,
    *,
    token_stride: int = 1,
    token_offset: jax.Array | int = 0,
    loss_chunk: int = 1024,
    attention: AttentionFunction = plain_attention,
    unroll: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Computes KL(last layer || adapted exit), and the cross-entropies [L] of these two, summed over tokens.

    Both are sums with batch.weights. The other entries of the cross-entropies are 0. Only the adapter has a gradient;
    nothing of the layers is kept for it.

    token_stride, token_offset: head and loss read every stride-th token from the offset on, with stride times its
        weight. loss_chunk: tokens whose logits exist at once. Other arguments as in `scan_layers`.
    """
    params = jax.lax.stop_gradient(params)
    text = cast(Any, batch)  # NumPy arrays serve as well
    state, last = exit_and_last_states(
        params,
        text.tokens,
        config,
        adapter.exit_layer,
        positions=text.positions,
        segment_ids=text.segment_ids,
        attention=attention,
        unroll=unroll,
    )
    sample = functools.partial(every, stride=token_stride, offset=token_offset)
    state, last, tokens, weights = map(sample, (state, last, text.targets, text.weights))
    objective, losses = exit_losses(
        params,
        adapter.apply(state)[None],
        Targets(tokens, token_stride * weights, teacher=last),
        Exits(weight=jnp.ones(1), distillation=jnp.ones(1)),
        config,
        loss_chunk,
        head_learns=False,
        learns_text=False,
    )
    both = jnp.array([adapter.exit_layer - 1, config.num_layers - 1])
    return objective, jax.lax.stop_gradient(jnp.zeros(config.num_layers).at[both].set(losses))
