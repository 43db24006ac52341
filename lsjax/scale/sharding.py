"""The device mesh, and one table that says along which of its axes every kind of array is split.

Axes: `data` replicates the model over batches, `fsdp` splits batch and parameters alike, `tensor` splits heads,
feed-forward and vocabulary. A length-1 axis stays, so there is one program and no special case.
"""

import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lsjax.config import MeshConfig
from lsjax.errors import UserError
from lsjax.model.output_major import INPUT_AXES

MESH_AXES = ("data", "fsdp", "tensor")

BATCH_AXES = ("data", "fsdp")

# Logical axis -> mesh axes. What is not named here is whole on every device.
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
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    except (NotImplementedError, ValueError) as error:  # a shape that the wiring of the chips does not give
        raise UserError(f"config.mesh {dict(zip(MESH_AXES, sizes, strict=True))}: {error}") from None


def spec(*logical_axes: str | None) -> P:
    return P(*(RULES.get(axis) for axis in logical_axes))


def free_axes() -> set[str]:
    """Axes of the mesh that is set along which the compiler still splits: those that no `jax.shard_map` around took."""
    mesh = jax.sharding.get_abstract_mesh()
    return {*mesh.axis_names} - {*mesh.manual_axes}


def free_spec(*logical_axes: str | None) -> P:
    """`spec` with the free axes alone."""
    free = free_axes()
    kept = lambda axes: all(axis in free for axis in ((axes,) if isinstance(axes, str) else axes or ()))  # noqa: E731
    return P(*(axes if kept(axes) else None for axes in spec(*logical_axes)))


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


def decoder_shardings(weights, mesh: Mesh):
    """Shardings of a decoder's weights (layers unstacked, `layers/0/attention/qkv`): split along `tensor` alone. What
    training gathers layer by layer would here be gathered for every token."""

    def leaf_sharding(path, leaf):
        keys = [_key_name(key) for key in path]
        in_layer = keys[0] == "layers"
        parameter = "/".join(keys[:1] + keys[2:] if in_layer else keys)
        if parameter in PARAMETER_AXES:
            axes = PARAMETER_AXES[parameter][in_layer:]
        else:  # of a weight with its outputs first, the kernel or the values, all inputs as one axis, or the scale
            parameter = parameter.rpartition("/")[0]
            axes, inputs = PARAMETER_AXES[parameter][in_layer:], INPUT_AXES.get(keys[-2], 1)
            axes = (*axes[inputs:], axes[0])[: leaf.ndim]
        partition = spec(*(None if axis == "width" else axis for axis in axes))
        return NamedSharding(mesh, _checked(partition, leaf.shape, mesh, "/".join(keys)))

    return jax.tree_util.tree_map_with_path(leaf_sharding, weights)


def decoding_shardings(state, mesh: Mesh):
    """Shardings of the state of a decoding loop: its caches along their heads, the rest whole everywhere."""
    heads, whole = cache_sharding(mesh), NamedSharding(mesh, P())
    rest = jax.tree.map(lambda _: whole, state._replace(cache=()))
    return rest._replace(cache=jax.tree.map(lambda _: heads, state.cache))


def cache_sharding(mesh: Mesh) -> NamedSharding:
    """Of every array [B, K, ...] of a KV cache."""
    return NamedSharding(mesh, spec(None, "kv_heads"))


def head_ways(mesh: Mesh) -> int:
    """Into how many parts KV heads are split."""
    return mesh.shape[RULES["kv_heads"]]


def mesh_of(array) -> Mesh | None:
    """The mesh over which an array (or its description) is laid out; None when it lies on one device."""
    sharding = getattr(array, "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


def replicated_like(array):
    """A sharding that is whole on every device that holds `array`."""
    mesh = mesh_of(array)
    return NamedSharding(mesh, P()) if mesh else array.sharding


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, spec("batch"))


def check_batch(batch_size: int, mesh: Mesh, key: str) -> None:
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise UserError(f"{key} is {batch_size} sequences, which do not divide over data x fsdp = {ways} devices")


def width_axis(parameter: str) -> int:
    """Which axis of a parameter (a path of PARAMETER_AXES) the fsdp mesh axis splits."""
    return PARAMETER_AXES[parameter].index("width")


def whole_layer(layer):
    """One layer's parameters gathered along fsdp."""

    def whole(path, leaf):
        axes = PARAMETER_AXES["/".join(["layers", *map(_key_name, path)])][1:]
        return constrain(leaf, *(None if axis == "width" else axis for axis in axes))

    return jax.tree_util.tree_map_with_path(whole, layer)


def whole_along_width(parameter: str) -> tuple[str | None, ...]:
    """The logical axes of a parameter whose parts along fsdp have been gathered for use."""
    return tuple(None if axis == "width" else axis for axis in PARAMETER_AXES[parameter])


def batch_ways() -> int:
    """Into how many parts the mesh that is set splits a batch."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def _key_name(key) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def _checked(partition: P, shape: tuple[int, ...], mesh: Mesh, name: str) -> P:
    for size, axis in zip(shape, partition, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise UserError(f"config.mesh.{axis} ({mesh.shape[axis]}) does not divide {name} of shape {shape}")
    return partition
