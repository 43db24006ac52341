"""Rematerialisation policies: what the backward pass recomputes instead of keeping, to trade time for memory."""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

# The large results of a layer, which its modules mark with `keep`.
_MATMULS = ("qkv", "attention", "attention_output", "gate_up")

# Policy -> the marked results that it keeps. Elements kept per token and layer, the layer's input included, when N = K:
# "none" keeps everything; "elementwise" 6 D + 2 F (norms, rotary and SiLU are recomputed); "feed_forward" 6 D;
# "layer" D.
KEPT = {
    "none": None,
    "elementwise": _MATMULS,
    "feed_forward": tuple(name for name in _MATMULS if name != "gate_up"),
    "layer": (),
}


def keep(x: jax.Array, name: str) -> jax.Array:
    """Marks a result as one that a policy may keep."""
    return checkpoint_name(x, name)


def rematerialized(layer: Callable, recomputed: str) -> Callable:
    """Returns the layer function with the policy `recomputed` (a key of KEPT) applied to its backward pass."""
    kept = KEPT[recomputed]
    if kept is None:
        return layer
    policy = jax.checkpoint_policies.save_only_these_names(*kept)
    # prevent_cse adds barriers, which only cost time here: in a scan XLA cannot merge the two passes anyway.
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)
