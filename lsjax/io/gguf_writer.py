"""Writes a model as a GGUF file of llama.cpp, with the `gguf` library."""

import contextlib
import dataclasses
import functools
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from lsjax.config import ModelConfig, RopeScaling
from lsjax.errors import UserError
from lsjax.files import unfinished
from lsjax.io.gguf_vocabulary import GGUFVocabulary
from lsjax.io.huggingface import outgoing_tensors
from lsjax.model.rope import inverse_frequencies
from lsjax.model.transformer import Params

_KINDS = {"float32": Kind.F32, "bfloat16": Kind.BF16, "float16": Kind.F16}
_FILE_TYPES = {
    Kind.F32: gguf.LlamaFileType.ALL_F32,
    Kind.F16: gguf.LlamaFileType.MOSTLY_F16,
    Kind.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    Kind.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}
_QUANTIZATION_VERSION = 2


class _Tensor(NamedTuple):
    """A tensor of the file, in the order in which it is written. read: returns it in float32, permuted."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    read: Callable[[], np.ndarray]


def write_gguf(
    path: Path, config: ModelConfig, params: Params, vocabulary: GGUFVocabulary, kind: Kind | None = None
) -> None:
    """Writes a GGUF file, which appears whole or not at all. Beyond the parameters, memory holds one tensor.

    kind: the type of the matrices; None keeps their dtypes. Norms are always F32, as llama.cpp requires.

    Raises UserError when the file cannot be written, or when the rows of a matrix do not fit the blocks of `kind`.
    """
    path = Path(path)
    tensors = list(_tensors(config, params, kind))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    _add_fields(writer, config, _stored_kind(params["embed"].dtype, kind))
    vocabulary.add_to(writer)
    for tensor in tensors:
        _check_blocks(tensor)
        bytes_shape = gguf.quants.quant_shape_to_byte_shape(tensor.shape, tensor.kind)
        size = int(np.prod(bytes_shape))
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=tensor.kind)
    try:
        with unfinished(temporary), contextlib.closing(writer):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                writer.write_tensor_data(gguf.quants.quantize(tensor.read(), tensor.kind))
            writer.flush()
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _add_fields(writer: gguf.GGUFWriter, config: ModelConfig, kind: Kind) -> None:
    """Adds what llama.cpp must know of the model apart from its vocabulary."""
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.feed_forward_width)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_epsilon)
    if config.rope_scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)


def _tensors(config: ModelConfig, params: Params, kind: Kind | None) -> Iterator[_Tensor]:
    """Yields the tensors of the file, with the names that the library gives them."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
    if config.rope_scaling.kind == "llama3":
        yield _Tensor("rope_freqs.weight", (config.head_width // 2,), Kind.F32, lambda: _rope_factors(config))
    for tensor in outgoing_tensors(config, params):
        name = names.get_name(tensor.name, try_suffixes=(".weight",))
        assert name is not None, tensor.name
        is_matrix = len(tensor.shape) > 1
        stored = _stored_kind(tensor.dtype, kind) if is_matrix else Kind.F32
        permuted = ".attn_q." in name or ".attn_k." in name
        head_width = config.head_width if permuted else None
        yield _Tensor(name, tensor.shape, stored, functools.partial(_read, tensor.read, head_width))


def _stored_kind(dtype: np.dtype, kind: Kind | None) -> Kind:
    """Returns the type that a matrix is stored in: `kind`, or None for that of its dtype."""
    return _KINDS[str(dtype)] if kind is None else kind  # F32 is 0, and so as false as None


def _read(read: Callable[[], np.ndarray], head_width: int | None) -> np.ndarray:
    values = read().astype(np.float32)
    return _permuted(values, head_width) if head_width else values


def _permuted(rows: np.ndarray, head_width: int) -> np.ndarray:
    """Permutes the rows of q or k.

    Rows i and i + H/2 of a head become neighbours, because llama.cpp's rotation pairs neighbours. Ours pairs halves.
    """
    split = rows.reshape(-1, 2, head_width // 2, rows.shape[-1])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)


def _rope_factors(config: ModelConfig) -> np.ndarray:
    """Returns by how much Llama 3's scaling divides each rotary frequency, [H/2]."""
    plain = dataclasses.replace(config, rope_scaling=RopeScaling())
    return (inverse_frequencies(plain) / inverse_frequencies(config)).astype(np.float32)


def _check_blocks(tensor: _Tensor) -> None:
    block, _ = gguf.GGML_QUANT_SIZES[tensor.kind]
    if tensor.shape[-1] % block:
        raise UserError(
            f"{tensor.kind.name} stores blocks of {block} numbers, but {tensor.name} has rows of {tensor.shape[-1]}"
        )
