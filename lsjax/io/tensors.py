"""Reads tensors from files into parameters: stacked, sharded, in the dtype asked for, with little extra memory."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.config import ModelConfig
from lsjax.errors import UserError
from lsjax.io.layout import Piece, Slices, overlap, parameter_pieces, read_piece, tensor_shapes
from lsjax.model.transformer import Params, abstract_params

_ALIGNMENT = 64  # bytes: XLA:CPU adopts a buffer aligned like this without copying it
_READ_ELEMENTS = 1 << 24  # elements per read: the memory that loading needs beyond the parameters


class StoredTensor(NamedTuple):
    """A tensor that is still in its file. `read(slices)` reads a part of it.

    dtype: the dtype of what `read` returns.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Slices], np.ndarray]


Tensors = Mapping[str, StoredTensor]


def check_tensors(tensors: Tensors, config: ModelConfig, where: str) -> None:
    """Raises UserError naming the first tensor that is missing, has another shape, or is not part of a Llama."""
    wanted = set()
    for name, shape in tensor_shapes(config):
        wanted.add(name)
        if name not in tensors:
            raise UserError(f"{where} lacks the tensor {name} {list(shape)}")
        if tensors[name].shape != shape:
            raise UserError(f"{where}: {name} has shape {list(tensors[name].shape)}, its config says {list(shape)}")
    extra = sorted(set(tensors) - wanted)
    if extra:
        raise UserError(f"{where} has {len(extra)} tensor(s) that a Llama of this config does not have: {extra[0]}")


def stored_dtypes(tensors: Tensors, config: ModelConfig) -> Params:
    """Returns, for each parameter, the dtype that keeps every bit of its tensors, as a tree of parameters."""

    def dtype_of(path, _):
        pieces = parameter_pieces(config)[parameter_path(path)]
        names = {piece.tensor.format(layer=layer) for piece in pieces for layer in range(config.num_layers)}
        return functools.reduce(jnp.promote_types, {tensors[name].dtype for name in names})

    return jax.tree_util.tree_map_with_path(dtype_of, abstract_params(config))


def place_params(tensors: Tensors, config: ModelConfig, abstract: Params) -> Params:
    """Reads parameters with the shapes, dtypes and shardings of `abstract`, each shard straight from the files.

    Beyond the parameters themselves, memory holds only a small part of one tensor at a time.
    """

    def place(path, leaf):
        pieces = parameter_pieces(config)[parameter_path(path)]
        fill = functools.partial(_fill, leaf=leaf, pieces=pieces, tensors=tensors)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, fill, dtype=leaf.dtype)

    return jax.tree_util.tree_map_with_path(place, abstract)


def place_layers(
    tensors: Tensors, config: ModelConfig, name: str, abstract: jax.ShapeDtypeStruct
) -> Iterator[jax.Array]:
    """Yields the parameter `name` of each layer in turn. A layer is read only when it is asked for."""
    for layer in range(config.num_layers):
        pieces = tuple(
            piece._replace(tensor=piece.tensor.format(layer=layer)) for piece in parameter_pieces(config)[name]
        )
        fill = functools.partial(_fill, leaf=abstract, pieces=pieces, tensors=tensors)
        yield jax.make_array_from_callback(abstract.shape, abstract.sharding, fill, dtype=abstract.dtype)


def parameter_path(path: Any) -> str:
    """Returns a JAX key path as text, such as layers/attention/qkv."""
    return "/".join(key.key for key in path)


def _fill(index: Slices | None, leaf: jax.ShapeDtypeStruct, pieces: tuple[Piece, ...], tensors: Tensors) -> np.ndarray:
    """Returns the block `index` of a parameter, read from the tensors that it is made of.

    leaf: shape and dtype of the whole parameter.
    """
    assert index is not None  # every device that is asked for holds a block
    block = tuple(slice(*cut.indices(size)) for cut, size in zip(index, leaf.shape, strict=True))
    out = _aligned_empty(tuple(cut.stop - cut.start for cut in block), leaf.dtype)
    stacked = "{layer}" in pieces[0].tensor
    layers = range(block[0].start, block[0].stop) if stacked else (0,)
    for position, layer in enumerate(layers):
        target, place = (out[position], block[1:]) if stacked else (out, block)
        for piece in pieces:
            tensor = tensors[piece.tensor.format(layer=layer)]
            for of_piece, of_block in _parts(piece, overlap(piece, place)):
                part = read_piece(piece, of_piece, tensor.read)
                if not all_finite(part):
                    raise UserError(not_finite(piece.tensor.format(layer=layer)))
                target[of_block] = part
    return out


def check_finite(params: Any) -> None:
    """Raises UserError that names the first parameter with NaN or infinity. The arrays may be spread over devices."""
    for path, finite in jax.tree_util.tree_leaves_with_path(jax.device_get(_are_finite(params))):
        if not finite:
            raise UserError(not_finite(parameter_path(path)))


@jax.jit
def _are_finite(params: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), params)


def not_finite(name: str) -> str:
    """Returns the message for a parameter with NaN or infinity."""
    return f"{name} holds NaN or infinity: the file is damaged, or training diverged before it was written"


def all_finite(values: np.ndarray) -> bool:
    """Returns whether an array of floating point holds neither NaN nor infinity.

    The bits of both, read as an integer, are at least those of infinity. Looking for the largest integer of either
    sign reads at the speed of memory and allocates nothing, unlike np.isfinite.
    """
    dtype = np.dtype(values.dtype)
    if values.size == 0:
        return True
    infinity = np.array(np.inf, dtype)
    signed, unsigned = np.dtype(f"i{dtype.itemsize}"), np.dtype(f"u{dtype.itemsize}")
    positive, negative = values.view(signed).max(), values.view(unsigned).max()
    return bool(positive < infinity.view(signed) and negative < (-infinity).view(unsigned))


def _parts(piece: Piece, cuts: tuple[Slices, Slices] | None) -> Iterator[tuple[Slices, Slices]]:
    """Splits slices into parts of at most _READ_ELEMENTS elements, along the leading axis of the tensor in its file."""
    if cuts is None:
        return
    axis = piece.order.index(0)
    of_piece, of_block = cuts
    sizes = [cut.stop - cut.start for cut in of_piece]
    step = max(1, _READ_ELEMENTS * sizes[axis] // math.prod(sizes))
    for start in range(0, sizes[axis], step):
        stop = min(start + step, sizes[axis])
        yield _narrowed(of_piece, axis, start, stop), _narrowed(of_block, axis, start, stop)


def _narrowed(cuts: Slices, axis: int, start: int, stop: int) -> Slices:
    base = cuts[axis].start
    return (*cuts[:axis], slice(base + start, base + stop), *cuts[axis + 1 :])


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
