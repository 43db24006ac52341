"""The Llama as functions on one plain dict of parameters.

The dict is {embed [V,D], layers: {...: [L, ...]}, final_norm: {scale [D]}, lm_head [D,V] unless tied}.

`forward` and `hidden_states` are the public functions. `scan_layers` is what they, training and evaluation share: it
runs all layers and lets the caller read the state before each one.
"""

import functools
from collections.abc import Callable
from typing import Any, TypedDict

import jax
import jax.numpy as jnp

from lsjax.config import ModelConfig
from lsjax.model.array_checks import check_layer_mask, check_params, check_tokens
from lsjax.model.attention import AttentionFunction, plain_attention
from lsjax.model.batch_subset import Update, subset_update
from lsjax.model.layers import Attend, DecoderLayer, RMSNorm
from lsjax.model.matmul import matmul, product_factor
from lsjax.model.rematerialize import rematerialized
from lsjax.model.rope import rotation
from lsjax.parallel.sharding import constrain, whole_along_width

Params = dict[str, Any]
# The named scope of the branch that skips a layer. lsjax/aot finds the branch by it in compiled programs.
LAYER_BRANCH = "layer_branch"


def init_params(key: jax.Array, config: ModelConfig) -> Params:
    """Draws float32 parameters: normal with standard deviation 0.02, residual projections scaled down with depth."""
    embed_key, head_key, layers_key = jax.random.split(key, 3)
    x = jnp.zeros((1, 1, config.width))
    cos_sin = rotation(jnp.zeros((1, 1), jnp.int32), config)

    def init_layer(layer_key):
        return DecoderLayer(config).init(layer_key, x, cos_sin, lambda q, k, v: (q, None))["params"]

    params = {
        "embed": 0.02 * jax.random.normal(embed_key, (config.vocab_size, config.width)),
        "layers": jax.vmap(init_layer)(jax.random.split(layers_key, config.num_layers)),
        "final_norm": {"scale": jnp.ones(config.width)},
    }
    if not config.tie_embeddings:
        params["lm_head"] = 0.02 * jax.random.normal(head_key, (config.width, config.vocab_size))
    return params


@functools.lru_cache(maxsize=64)
def abstract_params(config: ModelConfig) -> Params:
    """Returns the parameters of a model as abstract arrays: shapes and initial dtypes, nothing allocated."""
    return jax.eval_shape(lambda: init_params(jax.random.key(0), config))


def count_params(config: ModelConfig) -> int:
    """Returns the number of parameters of a model of this shape."""
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def final_norm(params: Params, x: jax.Array, config: ModelConfig) -> jax.Array:
    """Applies the norm that stands before the head, which all exits share: [..., D] -> [..., D]."""
    normed = RMSNorm(config.rms_norm_epsilon).apply({"params": params["final_norm"]}, x)
    assert not isinstance(normed, tuple)  # a pair only where collections are mutable
    return normed


def project_vocabulary(params: Params, x: jax.Array) -> jax.Array:
    """Projects normed states [..., D] to float32 logits [..., V]. Without lm_head the embedding is the head."""
    if "lm_head" in params:
        return matmul(x, params["lm_head"], out_dtype=jnp.float32)
    return jnp.einsum(
        "...d,vd->...v", product_factor(x), product_factor(params["embed"]), preferred_element_type=jnp.float32
    )


def exit_logits(params: Params, x: jax.Array, config: ModelConfig) -> jax.Array:
    """Computes g of Eq. 5, the norm and head that every exit shares: states [..., D] -> float32 logits [..., V]."""
    return project_vocabulary(params, final_norm(params, x, config))


def head_matrix(params: Params) -> Params:
    """Returns the part of the parameters that `project_vocabulary` reads: {lm_head} or {embed}."""
    name = "lm_head" if "lm_head" in params else "embed"
    return {name: params[name]}


def apply_layer(
    layer: Params, x: jax.Array, cos_sin: tuple[jax.Array, jax.Array], attend: Attend, config: ModelConfig
) -> tuple[jax.Array, Any]:
    """Runs one layer with its own (unstacked) parameters. Returns x + f_l(x) and the state of `attend`."""
    update, state = DecoderLayer(config).apply({"params": layer}, x, cos_sin, attend)
    return x + update, state


class LayerOptions(TypedDict, total=False):
    """The options of `scan_layers` that say how the layers run, for functions that pass them on."""

    layer_mask: jax.Array | None
    pieces: tuple[int, ...] | None
    attention: AttentionFunction
    rematerialize: str
    unroll: int


def _read_nothing(x: jax.Array, extra: Any) -> None:
    """Reads nothing off a layer's input."""


def scan_layers(
    params: Params,
    tokens: jax.Array,
    config: ModelConfig,
    *,
    layer_mask: jax.Array | None = None,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    per_layer: Any = None,
    read: Callable[[jax.Array, Any], Any] = _read_nothing,
    attention: AttentionFunction = plain_attention,
    rematerialize: str = "none",
    unroll: int = 1,
    pieces: tuple[int, ...] | None = None,
) -> tuple[jax.Array, Any]:
    """Runs all layers on tokens [B,S] and reads something off each layer's input, without keeping the inputs.

    layer_mask: [L] or [L,B], M of Eq. 1 for each layer (see `masked_update`, also for `pieces`).
    positions, segment_ids: [B,S], for packed documents; by default each sequence is one document.
    per_layer: a tree of [L, ...] arrays, whose entry l goes to `read`.
    read: called as read(x_l, per_layer[l]). It gets inputs, which the scan keeps anyway: to read an output, the
        backward pass would have to compute the last product of its layer again.
    rematerialize: what the backward pass recomputes (a key of KEPT in rematerialize.py).

    Returns x_L [B,S,D] and the results of `read`, stacked [L, ...].
    """
    x, per_row, update = _prepare(params, tokens, config, positions, segment_ids, attention)

    def body(x, layer_inputs):
        layer, keep, extra = layer_inputs
        seen = read(x, extra)
        x = masked_update(update, layer, x, per_row, keep, pieces)
        return constrain(x, "batch", None, None), seen

    body = rematerialized(body, rematerialize)
    return jax.lax.scan(body, x, (params["layers"], layer_mask, per_layer), unroll=unroll)


def exit_and_last_states(
    params: Params,
    tokens: jax.Array,
    config: ModelConfig,
    exit_layer: int,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    attention: AttentionFunction = plain_attention,
    unroll: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Runs all layers on tokens [B,S] and keeps two states: x_E after layer `exit_layer`, and x_L, both [B,S,D].

    Arguments as in `scan_layers`, which would stack the states of all layers to give one of them.
    """
    x, per_row, update = _prepare(params, tokens, config, positions, segment_ids, attention)

    def body(states, layer_inputs):
        (x, kept), (layer, is_exit) = states, layer_inputs
        x = constrain(x + update(layer, x, per_row), "batch", None, None)
        return (x, jnp.where(is_exit, x, kept)), None

    is_exit = jnp.arange(1, config.num_layers + 1) == exit_layer
    (last, kept), _ = jax.lax.scan(body, (x, x), (params["layers"], is_exit), unroll=unroll)
    return kept, last


def _prepare(
    params: Params,
    tokens: jax.Array,
    config: ModelConfig,
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
    attention: AttentionFunction,
) -> tuple[jax.Array, Any, Update]:
    """Returns what a scan over the layers needs: the embeddings [B,S,D], `per_row` and `update` of `masked_update`."""
    tokens = jnp.asarray(tokens)
    batch, length = tokens.shape
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(length), (batch, length))

    def update(layer, x, per_row):
        cos_sin, segment_ids = per_row

        def attend(q, k, v):
            return attention(q, k, v, segment_ids), None

        return DecoderLayer(config).apply({"params": layer}, x, cos_sin, attend)[0]

    # The table is gathered along D before the lookup, or the compiler would replicate the result.
    x = constrain(constrain(params["embed"], *whole_along_width("embed"))[tokens], "batch", None, None)
    return x, (rotation(positions, config), segment_ids), update


def masked_update(
    update: Update,
    layer: Params,
    x: jax.Array,
    per_row: Any,
    keep: jax.Array | None,
    pieces: tuple[int, ...] | None = None,
) -> jax.Array:
    """Computes x + M f(x) (Eq. 1), with f(x) = update(layer, x, per_row) and x [B,S,D].

    keep: the mask M. None runs the layer. A scalar 0 skips the layer's compute. [B] masks each sequence; with `pieces`
        the compute of sequences at 0 is skipped too (batch_subset.py).
    pieces: see `subset_update`.
    """
    if keep is None:
        return x + update(layer, x, per_row)
    keep = keep.astype(x.dtype)
    if keep.ndim == 0:
        with jax.named_scope(LAYER_BRANCH):
            return jax.lax.cond(keep != 0, lambda y: y + keep * update(layer, y, per_row), lambda y: y, x)
    if pieces:
        return x + subset_update(update, layer, x, per_row, keep, pieces)
    return x + keep[:, None, None] * update(layer, x, per_row)


def forward(params: Params, tokens: jax.Array, config: ModelConfig, layer_mask: jax.Array | None = None) -> jax.Array:
    """Computes the logits of the full model: tokens int [B,S] -> float32 [B,S,V].

    layer_mask: [L] or [L,B], multiplies what each layer adds (0 skips it); None runs every layer.

    Raises UserError for ids outside the vocabulary and for arguments of the wrong shape or dtype. Values are checked
    only outside `jax.jit`.
    """
    check_params(params, config, abstract_params)
    check_tokens(tokens, config.vocab_size)
    if layer_mask is not None:
        check_layer_mask(layer_mask, config.num_layers, len(tokens))
        layer_mask = jnp.asarray(layer_mask)
    x, _ = scan_layers(params, tokens, config, layer_mask=layer_mask)
    return exit_logits(params, x, config)


def hidden_states(params: Params, tokens: jax.Array, config: ModelConfig) -> jax.Array:
    """Computes the state after each layer, before the final norm: tokens int [B,S] -> [L,B,S,D].

    Raises UserError like `forward`.
    """
    check_params(params, config, abstract_params)
    check_tokens(tokens, config.vocab_size)
    last, inputs = scan_layers(params, tokens, config, read=lambda x, _: x)
    return jnp.concatenate([inputs[1:], last[None]])
