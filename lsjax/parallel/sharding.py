"""The device mesh, and the tables that say along which of its axes every kind of array is split.

Mesh axes: `data` splits the batch and replicates the model; `fsdp` splits both batch and parameters; `tensor` splits
heads, feed-forward and vocabulary. An axis of length 1 stays in the mesh, so one program serves every mesh.

RULES maps logical axes to mesh axes, PARAMETER_AXES gives the logical axes of every parameter.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from lsjax.config import MeshConfig
from lsjax.errors import UserError

# The checker takes it for a variable: jaxlib has no stubs, in which it would be a class.
Device: TypeAlias = jax.Device  # pyright: ignore[reportInvalidTypeForm]

MESH_AXES = ("data", "fsdp", "tensor")

BATCH_AXES = ("data", "fsdp")

# Logical axis -> mesh axes. A logical axis without an entry is whole on every device.
RULES = {
    "batch": BATCH_AXES,
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

# The same for LoRA adapters, whose rank is never split (lsjax/model/lora.py).
ADAPTER_AXES = {
    "embed/lora_a": ("vocabulary", None),
    "embed/lora_b": (None, "width"),
    "lm_head/lora_a": ("width", None),
    "lm_head/lora_b": (None, "vocabulary"),
    "layers/attention/qkv/lora_a": (None, "width", None),
    "layers/attention/qkv/lora_b": (None, None, "kv_heads", None, None),
    "layers/attention/output/lora_a": (None, "kv_heads", None, None, None),
    "layers/attention/output/lora_b": (None, None, "width"),
    "layers/feed_forward/gate_up/lora_a": (None, "width", None),
    "layers/feed_forward/gate_up/lora_b": (None, None, None, "feed_forward"),
    "layers/feed_forward/down/lora_a": (None, "feed_forward", None),
    "layers/feed_forward/down/lora_b": (None, None, "width"),
}
_TRAINING_AXES = PARAMETER_AXES | ADAPTER_AXES


def make_mesh(config: MeshConfig, devices: Sequence[Device] | None = None) -> Mesh:
    """Arranges the devices (default: all) as a mesh (data, fsdp, tensor).

    One of the three sizes may be -1 and takes the devices that the others leave. Raises UserError when the sizes do not
    fit the number of devices or the wiring of the chips.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"config.mesh (data={config.data}, fsdp={config.fsdp}, tensor={config.tensor}) does not fit "
            f"{len(devices)} device(s): the sizes must multiply to that number, and one may be -1"
        )
    try:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    except (NotImplementedError, ValueError) as error:  # a shape that the wiring of the chips does not allow
        raise UserError(f"config.mesh {dict(zip(MESH_AXES, sizes, strict=True))}: {error}") from None


def spec(*logical_axes: str | None) -> P:
    """Returns the partition of an array with these logical axes (None: a whole axis)."""
    return P(*(None if axis is None else RULES.get(axis) for axis in logical_axes))


def free_axes() -> set[str]:
    """Returns the axes of the current mesh that the compiler still splits: those that no enclosing shard_map took."""
    mesh = jax.sharding.get_abstract_mesh()
    return {*mesh.axis_names} - {*mesh.manual_axes}


def free_spec(*logical_axes: str | None) -> P:
    """Returns `spec` restricted to the free axes of the current mesh."""
    free = free_axes()

    def is_free(axes: str | tuple[str, ...] | None) -> bool:
        return {*((axes,) if isinstance(axes, str) else axes or ())} <= free

    return P(*(axes if is_free(axes) else None for axes in spec(*logical_axes)))


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Pins the layout of an activation to its logical axes. Without a mesh (`jax.set_mesh`) it does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*logical_axes))


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns the shardings of any tree that holds parameters or a LoRA adapter.

    A leaf whose path ends in the path of a parameter is split like that parameter, so optimizer moments lie as their
    parameters do. Any other leaf is replicated. Raises UserError when a mesh axis does not divide an array axis.
    """

    def leaf_sharding(path, leaf):
        name = _parameter_name(path)
        for parameter, axes in _TRAINING_AXES.items():
            if len(axes) == leaf.ndim and (name == parameter or name.endswith(f"/{parameter}")):
                return NamedSharding(mesh, checked_partition(spec(*axes), leaf.shape, mesh, name))
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def _parameter_name(path: Any) -> str:
    """Returns a tree path as text. The weight that a LoRA adapter changes has the name of the parameter it was."""
    return "/".join(map(key_name, path)).removesuffix("/weight")


def mesh_of(array: Any) -> Mesh | None:
    """Returns the mesh over which an array (or its description) is laid out; None when it lies on one device."""
    sharding = getattr(array, "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) else None


def replicated_like(array: jax.Array) -> Sharding:
    """Returns a sharding that is whole on every device that holds `array`."""
    mesh = mesh_of(array)
    return NamedSharding(mesh, P()) if mesh else array.sharding


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its first axis is split over data and fsdp."""
    return NamedSharding(mesh, spec("batch"))


def check_batch(batch_size: int, mesh: Mesh, key: str) -> None:
    """Raises UserError, naming `key`, unless the batch divides over the data and fsdp axes."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise UserError(
            f"{key} is {batch_size} sequences, which do not divide over data x fsdp = {ways} devices; choose a multiple"
        )


def width_axis(parameter: str) -> int:
    """Returns which axis of a parameter (a path of PARAMETER_AXES) the fsdp mesh axis splits."""
    return PARAMETER_AXES[parameter].index("width")


def whole_layer(layer: Any) -> Any:
    """Gathers the parameters of one layer along fsdp."""

    def whole(path, leaf):
        axes = _TRAINING_AXES[f"layers/{_parameter_name(path)}"][1:]
        return constrain(leaf, *(None if axis == "width" else axis for axis in axes))

    return jax.tree_util.tree_map_with_path(whole, layer)


def whole_along_width(parameter: str) -> tuple[str | None, ...]:
    """Returns the logical axes of a parameter after its parts along fsdp were gathered for use."""
    return tuple(None if axis == "width" else axis for axis in PARAMETER_AXES[parameter])


def batch_ways() -> int:
    """Returns the number of parts into which the current mesh splits a batch (1 without a mesh)."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def key_name(key: Any) -> str:
    """Returns the name of one key of a tree path."""
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def checked_partition(partition: P, shape: tuple[int, ...], mesh: Mesh, name: str) -> P:
    """Returns the partition, or raises UserError when a mesh axis does not divide the array `name`."""
    for size, axis in zip(shape, partition, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise UserError(
                f"config.mesh.{axis} ({mesh.shape[axis]}) does not divide {name} of shape {shape}; choose a divisor"
            )
    return partition


def abstract_arrays(tree: Any, shardings: Any) -> Any:
    """Describes a tree of arrays with their shardings.

    Checkpoints are restored straight into such a description, so that initial and restored state never coexist.
    """
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)
