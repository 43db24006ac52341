"""What the backward pass computes again instead of keeping it: memory against time, by name."""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

# The large results of a layer, as its modules mark them with `keep`.
_MATMULS = ("qkv", "attention", "attention_output", "gate_up")

# What is recomputed -> the marked results that are kept. Elements a token and layer, its input among them, when N = K:
# none keeps everything; elementwise 6 D + 2 F (norms, rotary, SiLU again); feed_forward 6 D; layer D.
KEPT = {
    "none": None,
    "elementwise": _MATMULS,
    "feed_forward": tuple(name for name in _MATMULS if name != "gate_up"),
    "layer": (),
}


def keep(x: jax.Array, name: str) -> jax.Array:
    """Marks a result that a policy may keep."""
    return checkpoint_name(x, name)


def rematerialized(layer: Callable, recomputed: str) -> Callable:
    """The layer function with its backward pass recomputing `recomputed`, a key of KEPT."""
    kept = KEPT[recomputed]
    if kept is None:
        return layer
    policy = jax.checkpoint_policies.save_only_these_names(*kept)
    # In a scan nothing can be merged with the forward pass anyway; the barriers would only cost.
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)
