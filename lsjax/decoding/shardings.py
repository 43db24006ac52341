"""Shardings for decoding: weights, the KV cache and the state of a loop, split along the `tensor` axis alone."""

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lsjax.model.weight_layout import INPUT_AXES
from lsjax.parallel.sharding import PARAMETER_AXES, RULES, checked_partition, key_name, spec


def decoder_weight_shardings(weights, mesh: Mesh):
    """Returns shardings of decoder weights (layers unstacked, `layers/0/attention/qkv`), split along `tensor` alone.

    Training also splits parameters along fsdp and gathers them layer by layer. Decoding would gather them for every
    token.
    """

    def leaf_sharding(path, leaf):
        keys = [key_name(key) for key in path]
        in_layer = keys[0] == "layers"
        parameter = "/".join(keys[:1] + keys[2:] if in_layer else keys)
        if parameter in PARAMETER_AXES:
            axes = PARAMETER_AXES[parameter][in_layer:]
        else:  # a weight with its outputs first: its kernel or int8 values (all inputs as one axis), or its scale
            parameter = parameter.rpartition("/")[0]
            axes, inputs = PARAMETER_AXES[parameter][in_layer:], INPUT_AXES.get(keys[-2], 1)
            axes = (*axes[inputs:], axes[0])[: leaf.ndim]
        partition = spec(*(None if axis == "width" else axis for axis in axes))
        return NamedSharding(mesh, checked_partition(partition, leaf.shape, mesh, "/".join(keys)))

    return jax.tree_util.tree_map_with_path(leaf_sharding, weights)


def draft_head_shardings(head, num_ids: int, mesh: Mesh):
    """Returns shardings of a head with `num_ids` rows: split as the whole head is, or replicated if that cannot be."""
    splits = num_ids % mesh.shape[RULES["vocabulary"]] == 0
    return jax.tree.map(lambda leaf: NamedSharding(mesh, leaf.sharding.spec if splits else P()), head)


def decode_state_shardings(state, mesh: Mesh):
    """Returns shardings of a loop's state: caches split by heads, the rest replicated."""
    heads, whole = kv_cache_sharding(mesh), NamedSharding(mesh, P())
    rest = jax.tree.map(lambda _: whole, state._replace(cache=()))
    return rest._replace(cache=jax.tree.map(lambda _: heads, state.cache))


def kv_cache_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of every array [B, K, ...] of a KV cache."""
    return NamedSharding(mesh, spec(None, "kv_heads"))


def kv_head_shards(mesh: Mesh) -> int:
    """Returns the number of parts that KV heads are split into."""
    return mesh.shape[RULES["kv_heads"]]
