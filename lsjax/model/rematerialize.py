"""What the backward pass computes again instead of keeping it: memory against time, by name."""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

# The large results of a layer, as its modules mark them with `keep`.
_MATMULS = ("qkv", "attention", "attention_output", "gate_up")

# What is recomputed -> the marked results that are kept. Elements a token and layer, for a Llama with N = K heads:
# none keeps everything; elementwise 5 D + 2 F (norms, rotary, SiLU again); feed_forward 5 D; layer: only its input, D.
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
