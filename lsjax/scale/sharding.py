"""The device mesh, and one table that says along which of its axes every kind of array is split.

Axes: `data` replicates the model over batches, `fsdp` splits batch and parameters alike, `tensor` splits heads,
feed-forward and vocabulary. A length-1 axis stays, so there is one program and no special case.
"""

import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lsjax.config import MeshConfig
from lsjax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. What is not named here is whole on every device.
RULES = {
    "batch": ("data", "fsdp"),
    "width": "fsdp",
    "kv_heads": "tensor",
    "feed_forward": "tensor",
    "vocabulary": "tensor",
}

# Parameter path -> its logical axes. The layer axis of stacked parameters is never split.
PARAMETER_AXES = {
    "embed": ("vocabulary", "width"),
    "lm_head": ("width", "vocabulary"),
    "final_norm/scale": (None,),
    "layers/attention_norm/scale": (None, None),
    "layers/attention/qkv": (None, "width", "kv_heads", None, None),
    "layers/attention/output": (None, "kv_heads", None, None, "width"),
    "layers/feed_forward_norm/scale": (None, None),
    "layers/feed_forward/gate_up": (None, "width", None, "feed_forward"),
    "layers/feed_forward/down": (None, "feed_forward", "width"),
}


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """All devices as (data, fsdp, tensor); one size may be -1. Raises UserError when they do not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"config.mesh (data={config.data}, fsdp={config.fsdp}, tensor={config.tensor}) does not fit "
            f"{len(devices)} device(s)"
        )
    try:
        return jax.make_mesh(sizes, MESH_AXES, devices=devices, axis_types=(AxisType.Auto,) * 3)
    except (NotImplementedError, ValueError) as error:  # a shape that the wiring of the chips does not give
        raise UserError(f"config.mesh {dict(zip(MESH_AXES, sizes, strict=True))}: {error}") from None


def spec(*logical_axes: str | None) -> P:
    return P(*(RULES.get(axis) for axis in logical_axes))


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Pins the layout of an activation when a mesh is set (`jax.set_mesh`); without one, does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*logical_axes))


def tree_shardings(tree, mesh: Mesh):
    """Shardings for any tree that holds parameters: each leaf goes by the parameter path its own path ends in
    (so optimizer moments lie as their parameters do); anything else is replicated."""

    def leaf_sharding(path, leaf):
        name = "/".join(_key_name(key) for key in path)
        for parameter, axes in PARAMETER_AXES.items():
            if len(axes) == leaf.ndim and (name == parameter or name.endswith(f"/{parameter}")):
                return NamedSharding(mesh, _checked(spec(*axes), leaf.shape, mesh, name))
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, spec("batch"))


def check_batch(batch_size: int, mesh: Mesh, key: str) -> None:
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise UserError(f"{key} is {batch_size} sequences, which do not divide over data x fsdp = {ways} devices")


def _key_name(key) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def _checked(partition: P, shape: tuple[int, ...], mesh: Mesh, name: str) -> P:
    for size, axis in zip(shape, partition, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise UserError(f"config.mesh.{axis} ({mesh.shape[axis]}) does not divide {name} of shape {shape}")
    return partition
