"""Maps the tensors of a Hugging Face Llama to places in our parameters: one table, used in both directions.

Hugging Face stores every projection as [outputs, inputs]. Ours are [inputs, outputs]; q, k and v of a KV head are
stored together, and so are the two inputs of SwiGLU (see lsjax/model/layers.py). Both sides rotate half-split heads,
so no head is permuted.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from lsjax.config import ModelConfig

Slices = tuple[slice, ...]


class Piece(NamedTuple):
    """One tensor of a file and its place in a parameter, or in one layer of a stacked parameter.

    tensor: the tensor's name; {layer} stands for the layer number.
    axes: for each axis of the tensor, the sizes of our axes that it is split into.
    order: the permutation that puts those axes into our order.
    offset: where the result starts in the parameter.
    """

    tensor: str
    axes: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]
    offset: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor in its file."""
        return tuple(math.prod(axis) for axis in self.axes)

    @property
    def size(self) -> tuple[int, ...]:
        """The sizes along our axes, in our order."""
        cut = list(itertools.chain(*self.axes))
        return tuple(cut[axis] for axis in self.order)


def parameter_pieces(config: ModelConfig) -> dict[str, tuple[Piece, ...]]:
    """Returns the tensors that each parameter is made of, by parameter path."""
    c = config
    D, K, H, F, V = c.width, c.num_kv_heads, c.head_width, c.feed_forward_width, c.vocab_size
    G = c.num_heads // c.num_kv_heads
    layer, attention = "model.layers.{layer}", "model.layers.{layer}.self_attn"

    def vector(name):
        return (Piece(name, ((D,),), (0,), (0,)),)

    def heads(name, count, offset):  # [K*count*H, D] -> [D, K, count, H]
        return Piece(f"{attention}.{name}.weight", ((K, count, H), (D,)), (3, 0, 1, 2), (0, 0, offset, 0))

    def gate_or_up(name, offset):  # [F, D] -> [D, 1, F]
        return Piece(f"{layer}.mlp.{name}.weight", ((F, 1), (D,)), (2, 1, 0), (0, offset, 0))

    pieces = {
        "embed": (Piece("model.embed_tokens.weight", ((V,), (D,)), (0, 1), (0, 0)),),
        "layers/attention_norm/scale": vector(f"{layer}.input_layernorm.weight"),
        "layers/attention/qkv": (heads("q_proj", G, 0), heads("k_proj", 1, G), heads("v_proj", 1, G + 1)),
        "layers/attention/output": (
            Piece(f"{attention}.o_proj.weight", ((D,), (K, G, H)), (1, 2, 3, 0), (0, 0, 0, 0)),
        ),
        "layers/feed_forward_norm/scale": vector(f"{layer}.post_attention_layernorm.weight"),
        "layers/feed_forward/gate_up": (gate_or_up("gate_proj", 0), gate_or_up("up_proj", 1)),
        "layers/feed_forward/down": (Piece(f"{layer}.mlp.down_proj.weight", ((D,), (F,)), (1, 0), (0, 0)),),
        "final_norm/scale": vector("model.norm.weight"),
    }
    if not c.tie_embeddings:
        pieces["lm_head"] = (Piece("lm_head.weight", ((V,), (D,)), (1, 0), (0, 0)),)
    return pieces


def tensor_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the name and the shape of every tensor of the model, as files have them."""
    for piece in itertools.chain(*parameter_pieces(config).values()):
        for layer in range(config.num_layers) if "{layer}" in piece.tensor else (0,):
            yield piece.tensor.format(layer=layer), piece.shape


def read_piece(piece: Piece, wanted: Slices, read: Callable[[Slices], np.ndarray]) -> np.ndarray:
    """Reads the part `wanted` of one tensor and returns it in our axes.

    wanted: slices along our axes, counted from the start of the piece.
    read: reads slices of the tensor as its file stores it.

    Where several of our axes share one axis of the file, only the leading one is narrowed on reading, so that rows
    come as one range; the others are cut afterwards.
    """
    place = {axis: wanted[ours] for ours, axis in enumerate(piece.order)}
    at, sizes, rest = [], [], []
    for group in piece.axes:
        leading, *others = (place[len(sizes) + axis] for axis in range(len(group)))
        inner = math.prod(group[1:])
        at.append(slice(leading.start * inner, leading.stop * inner))
        sizes += [leading.stop - leading.start, *group[1:]]
        rest += [slice(None), *others]
    return read(tuple(at)).reshape(sizes)[tuple(rest)].transpose(piece.order)


def extract_piece(piece: Piece, parameter: np.ndarray) -> np.ndarray:
    """Returns the tensor as files store it, cut out of a parameter or of one layer of a stacked parameter."""
    place = tuple(slice(start, start + size) for start, size in zip(piece.offset, piece.size, strict=True))
    return np.ascontiguousarray(parameter[place].transpose(np.argsort(piece.order))).reshape(piece.shape)


def overlap(piece: Piece, block: Slices) -> tuple[Slices, Slices] | None:
    """Returns where a piece and a block of its parameter overlap, or None when they do not.

    Returns (slices of the piece, slices of the block).
    """
    of_piece, of_block = [], []
    for start, size, wanted in zip(piece.offset, piece.size, block, strict=True):
        low, high = max(start, wanted.start), min(start + size, wanted.stop)
        if low >= high:
            return None
        of_piece.append(slice(low - start, high - start))
        of_block.append(slice(low - wanted.start, high - wanted.start))
    return tuple(of_piece), tuple(of_block)
