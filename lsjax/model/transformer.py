"""The Llama as functions on one plain dict of parameters.

{embed [V,D], layers: {...: [L, ...]}, final_norm: {scale [D]}, lm_head [D,V] unless tied}
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lsjax.config import ModelConfig
from lsjax.model.attention import AttentionFunction, plain_attention
from lsjax.model.layers import DecoderLayer, RMSNorm
from lsjax.model.matmul import matmul, rounded
from lsjax.model.rematerialize import rematerialized
from lsjax.model.rope import rotation
from lsjax.model.subset import Update, subset_update
from lsjax.scale.sharding import constrain, whole_along_width

Params = dict[str, Any]
LAYER_BRANCH = "layer_branch"  # the scope of the branch that skips a layer: compiled programs are read by it


def init_params(key: jax.Array, config: ModelConfig) -> Params:
    """Random float32 parameters: normal(0.02), residual projections scaled down with depth."""
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


def count_params(config: ModelConfig) -> int:
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def final_norm(params: Params, x: jax.Array, config: ModelConfig) -> jax.Array:
    return RMSNorm(config.rms_norm_epsilon).apply({"params": params["final_norm"]}, x)


def project_vocabulary(params: Params, x: jax.Array) -> jax.Array:
    """Normed states [..., D] -> float32 logits [..., V]. The embedding is the head when there is no lm_head."""
    if "lm_head" in params:
        return matmul(x, params["lm_head"], out_dtype=jnp.float32)
    return jnp.einsum("...d,vd->...v", rounded(x), rounded(params["embed"]), preferred_element_type=jnp.float32)


def exit_logits(params: Params, x: jax.Array, config: ModelConfig) -> jax.Array:
    """g of Eq. 5, the one head every exit shares: hidden states [..., D] -> float32 logits [..., V]."""
    return project_vocabulary(params, final_norm(params, x, config))


def head_matrix(params: Params) -> Params:
    """The part of the parameters that `project_vocabulary` reads."""
    name = "lm_head" if "lm_head" in params else "embed"
    return {name: params[name]}


def apply_layer(layer: Params, x: jax.Array, cos_sin, attend, config: ModelConfig) -> tuple[jax.Array, Any]:
    """One layer with its own (unstacked) parameters: (x + f_l(x), state of `attend`)."""
    update, state = DecoderLayer(config).apply({"params": layer}, x, cos_sin, attend)
    return x + update, state


def scan_layers(
    params: Params,
    tokens: jax.Array,
    config: ModelConfig,
    *,
    layer_mask: jax.Array | None = None,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    per_layer: Any = None,
    read: Callable[[jax.Array, Any], Any] = lambda x, _: None,
    attention: AttentionFunction = plain_attention,
    rematerialize: str = "none",
    unroll: int = 1,
    pieces: tuple[int, ...] | None = None,
) -> tuple[jax.Array, Any]:
    """Runs all layers and reads something off each one's input, without keeping the inputs.

    tokens [B,S]; layer_mask and pieces: see `masked_update`; positions and segment_ids [B,S] for packed documents
    (default: one document a row); per_layer: a tree of [L, ...] arrays; read(x_l, per_layer[l]) -> anything;
    rematerialize: what the backward pass recomputes of a layer (lsjax/model/rematerialize.py). Inputs are what a scan
    keeps anyway: of an output, the last product of its layer would have to be computed again for `read`.
    Returns (x_L [B,S,D], what `read` gave, stacked [L, ...]).
    """
    tokens = jnp.asarray(tokens)
    batch, length = tokens.shape
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    cos_sin = rotation(positions, config)

    def update(layer, x, per_row):
        cos_sin, segment_ids = per_row
        attend = lambda q, k, v: (attention(q, k, v, segment_ids), None)  # noqa: E731
        return DecoderLayer(config).apply({"params": layer}, x, cos_sin, attend)[0]

    def body(x, layer_inputs):
        layer, keep, extra = layer_inputs
        seen = read(x, extra)
        x = masked_update(update, layer, x, (cos_sin, segment_ids), keep, pieces)
        return constrain(x, "batch", None, None), seen

    body = rematerialized(body, rematerialize)
    # Rows are looked up in a table that is whole along D: split along it, the compiler would replicate the result.
    x = constrain(constrain(params["embed"], *whole_along_width("embed"))[tokens], "batch", None, None)
    return jax.lax.scan(body, x, (params["layers"], layer_mask, per_layer), unroll=unroll)


def masked_update(
    update: Update,
    layer: Params,
    x: jax.Array,
    per_row: Any,
    keep: jax.Array | None,
    pieces: tuple[int, ...] | None = None,
) -> jax.Array:
    """x + M f(x) (Eq. 1), with f = update(layer, x, per_row). keep: None runs the layer; a scalar of 0 skips its
    compute; [B] masks each sample, and with `pieces` skips compute of those at 0 (lsjax/model/subset.py)."""
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
    """Logits of the full model: tokens int [B,S] -> float32 [B,S,V].

    layer_mask [L,B] or [L] multiplies what each layer adds (0 skips it); None runs every layer.
    """
    x, _ = scan_layers(params, tokens, config, layer_mask=layer_mask)
    return exit_logits(params, x, config)


def hidden_states(params: Params, tokens: jax.Array, config: ModelConfig) -> jax.Array:
    """The state after each layer, before the final norm: tokens int [B,S] -> [L,B,S,D]."""
    last, inputs = scan_layers(params, tokens, config, read=lambda x, _: x)
    return jnp.concatenate([inputs[1:], last[None]])
