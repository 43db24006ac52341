"""Tensors in files -> parameters in place: stacked, sharded, of the dtype asked for, a little memory at a time."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.config import ModelConfig
from lsjax.errors import UserError
from lsjax.interop.layout import Piece, Slices, overlap, parameter_pieces, read_piece, tensor_shapes
from lsjax.model.transformer import Params, init_params

_ALIGNMENT = 64  # bytes: XLA:CPU takes such a buffer over as it is, without a copy
_READ_ELEMENTS = 1 << 24  # read at a time: what loading needs beyond the parameters


class StoredTensor(NamedTuple):
    """A tensor that is still in its file. `read(slices)` reads a part of it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Slices], np.ndarray]


Tensors = Mapping[str, StoredTensor]


def check_tensors(tensors: Tensors, config: ModelConfig, where: str) -> None:
    """Raises UserError naming the first tensor that is missing, of another shape, or not part of a Llama."""
    wanted = set()
    for name, shape in tensor_shapes(config):
        wanted.add(name)
        if name not in tensors:
            raise UserError(f"{where} lacks the tensor {name} {list(shape)}")
        if tensors[name].shape != shape:
            raise UserError(f"{where}: {name} has shape {list(tensors[name].shape)}, its config says {list(shape)}")
    extra = sorted(set(tensors) - wanted)
    if extra:
        raise UserError(f"{where} has {len(extra)} tensor(s) that a Llama of this config does not: {extra[0]}")


def stored_dtypes(tensors: Tensors, config: ModelConfig) -> Params:
    """The dtype of each parameter that keeps every bit of its tensors, as a tree of parameters."""

    def dtype_of(path, _):
        pieces = parameter_pieces(config)[parameter_path(path)]
        names = {piece.tensor.format(layer=layer) for piece in pieces for layer in range(config.num_layers)}
        return functools.reduce(jnp.promote_types, {tensors[name].dtype for name in names})

    return jax.tree_util.tree_map_with_path(dtype_of, abstract_params(config))


def place_params(tensors: Tensors, config: ModelConfig, abstract: Params) -> Params:
    """Parameters laid out as `abstract` says (shape, dtype, sharding), each shard read straight from the files.

    Beyond the parameters themselves, memory holds a small part of one tensor at a time.
    """

    def place(path, leaf):
        pieces = parameter_pieces(config)[parameter_path(path)]
        fill = lambda index: _fill(index, leaf, pieces, tensors)  # noqa: E731
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, fill, dtype=leaf.dtype)

    return jax.tree_util.tree_map_with_path(place, abstract)


def place_layers(
    tensors: Tensors, config: ModelConfig, name: str, abstract: jax.ShapeDtypeStruct
) -> Iterator[jax.Array]:
    """The parameter `name` of one layer after the other, each read when it is asked for."""
    for layer in range(config.num_layers):
        pieces = tuple(
            piece._replace(tensor=piece.tensor.format(layer=layer)) for piece in parameter_pieces(config)[name]
        )
        fill = functools.partial(_fill, leaf=abstract, pieces=pieces, tensors=tensors)
        yield jax.make_array_from_callback(abstract.shape, abstract.sharding, fill, dtype=abstract.dtype)


def abstract_params(config: ModelConfig) -> Params:
    return jax.eval_shape(lambda: init_params(jax.random.key(0), config))


def parameter_path(path) -> str:
    return "/".join(key.key for key in path)


def _fill(index: Slices, leaf: jax.ShapeDtypeStruct, pieces: tuple[Piece, ...], tensors: Tensors) -> np.ndarray:
    """The block `index` of a parameter."""
    block = tuple(slice(*cut.indices(size)) for cut, size in zip(index, leaf.shape, strict=True))
    out = _aligned_empty(tuple(cut.stop - cut.start for cut in block), leaf.dtype)
    stacked = "{layer}" in pieces[0].tensor
    layers = range(block[0].start, block[0].stop) if stacked else (0,)
    for position, layer in enumerate(layers):
        target, place = (out[position], block[1:]) if stacked else (out, block)
        for piece in pieces:
            tensor = tensors[piece.tensor.format(layer=layer)]
            for of_piece, of_block in _parts(piece, overlap(piece, place)):
                target[of_block] = read_piece(piece, of_piece, tensor.read)
    return out


def _parts(piece: Piece, cuts: tuple[Slices, Slices] | None) -> Iterator[tuple[Slices, Slices]]:
    """The same slices in parts of at most _READ_ELEMENTS, cut along the leading axis of the file's tensor."""
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
