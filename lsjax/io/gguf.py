"""Reads GGUF files of llama.cpp: any Llama, in any quantisation that the `gguf` library can expand."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lsjax.config import ModelConfig, RopeScaling
from lsjax.config_checks import check_model
from lsjax.errors import UserError
from lsjax.io.exit_adapter import adapter_path
from lsjax.io.gguf_file import GGUFTensor, read_gguf
from lsjax.io.gguf_tokenizer import gguf_tokenizer
from lsjax.io.layout import Slices
from lsjax.io.source import FileSource
from lsjax.io.tensors import StoredTensor
from lsjax.model.rope import inverse_frequencies

_MAGIC = b"GGUF"
# Hugging Face names by GGUF name.
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Fields that change what llama.cpp computes for a Llama, with the only value that lsjax supports.
_REQUIRED_VALUES = {"llama.attention.causal": True, "llama.rope.scaling.attn_factor": 1.0}
_ROPE_FACTORS = "rope_freqs.weight"
# GGUF stores the factors that Llama 3's frequency scaling results in, not its settings. All published Llamas use these.
_LLAMA3_SETTINGS = {"low_frequency_factor": 1.0, "high_frequency_factor": 4.0, "original_context_length": 8192}


def is_gguf(path: Path) -> bool:
    """Returns whether a file starts with the magic number of GGUF."""
    try:
        with path.open("rb") as file:
            return file.read(4) == _MAGIC
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def open_gguf(path: Path) -> FileSource:
    """Opens a GGUF file without reading its parameters.

    Raises UserError that names the field or tensor that is damaged, missing or not part of a plain Llama.
    """
    path = Path(path)
    fields, tensors = read_gguf(path)
    with _making_sense(path):
        config = _model_config(fields, tensors, str(path))
        weights = {name: tensor for name, tensor in tensors.items() if name != _ROPE_FACTORS}
        stored = {_huggingface_name(name): _stored_tensor(tensor, config) for name, tensor in weights.items()}
    return FileSource(str(path), config, gguf_tokenizer(fields, str(path)), stored, adapter_path(path))


def read_gguf_config(path: Path) -> ModelConfig:
    """Reads the model config out of the metadata of a GGUF file."""
    with _making_sense(path):
        fields, tensors = read_gguf(Path(path))
        return _model_config(fields, tensors, str(path))


@contextlib.contextmanager
def _making_sense(path: Path) -> Iterator[None]:
    """Raises UserError for the errors that fields of the wrong type cause: a text for a number, zero heads."""
    try:
        yield
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} has a field or tensor that makes no sense for a Llama: {error}") from None


def _model_config(fields: dict[str, Any], tensors: dict[str, GGUFTensor], where: str) -> ModelConfig:
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{where} holds the architecture {architecture!r}; lsjax reads only llama")
    if fields.get("llama.expert_count"):
        raise UserError(
            f"{where} is a mixture of {fields['llama.expert_count']} experts; lsjax reads only dense Llamas"
        )

    for key, value in _REQUIRED_VALUES.items():
        if fields.get(key, value) != value:
            raise UserError(f"{where}: {key} is {fields[key]!r}; lsjax supports only {value!r}")

    def field(key: str, kind: type, default: Any = None) -> Any:
        value = _number(fields, key, kind, default)
        if value is None:
            raise UserError(f"{where} has no field llama.{key}")
        return value

    width, heads = field("embedding_length", int), field("attention.head_count", int)
    if "token_embd.weight" not in tensors or len(tensors["token_embd.weight"].header.shape) != 2:
        raise UserError(f"{where} lacks the tensor token_embd.weight of two axes")
    if other := [name for name in tensors if "." not in name]:
        raise UserError(f"{where} has the tensor {other[0]!r}, which a Llama does not have")
    if heads < 1:
        raise UserError(f"{where}: llama.attention.head_count is {heads}")
    head_width = field("attention.key_length", int, width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if field(key, int, head_width) != head_width:
            raise UserError(f"{where}: llama.{key} is {field(key, int)}, but its heads have width {head_width}")
    config = ModelConfig(
        num_layers=field("block_count", int),
        width=width,
        num_heads=heads,
        num_kv_heads=field("attention.head_count_kv", int, heads),
        head_width=head_width,
        feed_forward_width=field("feed_forward_length", int),
        vocab_size=int(tensors["token_embd.weight"].header.shape[1]),
        context_length=field("context_length", int),
        tie_embeddings="output.weight" not in tensors,
        rope_theta=field("rope.freq_base", float, 10000.0),
        rope_scaling=_rope_scaling(fields, tensors, head_width, where),
        rms_norm_epsilon=field("attention.layer_norm_rms_epsilon", float),
    )
    try:
        return check_model(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _number(fields: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """Returns the number in field llama.`key`, or `default`. An array of equal numbers, one per layer, is that number.

    A float is the shortest decimal number that rounds to the same float32: 1e-5, not 9.99999974738e-06.
    """
    value = _one_number(fields.get(f"llama.{key}", default), key)
    # bool is a subclass of int, and a file may hold a float where llama.cpp wants an integer.
    if value is not None and type(value) not in ((int,) if kind is int else (int, float)):
        raise ValueError(f"llama.{key} must be {'a whole number' if kind is int else 'a number'}, got {value!r}")
    return value if value is None or kind is int else float(str(np.float32(value)))


def _one_number(value: Any, key: str) -> Any:
    """Returns the first of several equal values, and anything else as it is."""
    if not isinstance(value, list) or not value:
        return value
    if any(other != value[0] for other in value):
        raise ValueError(f"llama.{key} differs between layers: {value}")
    return value[0]


def _rope_scaling(fields: dict[str, Any], tensors: dict[str, GGUFTensor], head_width: int, where: str) -> RopeScaling:
    """Returns the rotary scaling, under llama.cpp's rules for fields that are missing."""
    # As in llama.cpp, a factor alone means linear, 0 means none, and old files use another key.
    kind = fields.get("llama.rope.scaling.type", "linear")
    factor = _number(fields, "rope.scaling.factor", float, _number(fields, "rope.scale_linear", float, 0.0))
    if kind == "linear" and factor not in (0.0, 1.0):
        return RopeScaling("linear", factor)
    if kind not in ("none", "linear"):
        raise UserError(f"{where}: rope scaling {kind!r}; lsjax supports none, linear and llama3")
    if _ROPE_FACTORS not in tensors:
        return RopeScaling()
    factors = np.asarray(tensors[_ROPE_FACTORS].header.data, np.float64)
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise UserError(f"{where}: {_ROPE_FACTORS} must hold positive numbers")
    scaling = RopeScaling("llama3", factor=round(float(factors.max()), 4), **_LLAMA3_SETTINGS)
    theta = _number(fields, "rope.freq_base", float, 10000.0)
    if not _gives_factors(scaling, theta, head_width, factors):
        raise UserError(f"{where}: {_ROPE_FACTORS} is not Llama 3's frequency scaling by {scaling.factor:g}")
    return scaling


def _gives_factors(scaling: RopeScaling, theta: float, head_width: int, factors: np.ndarray) -> bool:
    """Returns whether a scaling divides the rotary frequencies by `factors`, [H/2]."""
    plain = ModelConfig(head_width=head_width, rope_theta=theta)
    ratio = inverse_frequencies(plain) / inverse_frequencies(
        ModelConfig(head_width=head_width, rope_theta=theta, rope_scaling=scaling)
    )
    return ratio.shape == factors.shape and np.allclose(ratio, factors, rtol=1e-3)


def _huggingface_name(name: str) -> str:
    """Renames blk.3.attn_q.weight to model.layers.3.self_attn.q_proj.weight. Keeps an unknown name, to be reported."""
    stem, _, suffix = name.rpartition(".")
    block, _, rest = stem.partition(".")
    layer, _, kind = rest.partition(".")
    if block == "blk" and kind in _NAMES:
        return f"model.layers.{layer}.{_NAMES[kind]}.{suffix}"
    return f"{_NAMES[stem]}.{suffix}" if stem in _NAMES else name


def _stored_tensor(source: GGUFTensor, config: ModelConfig) -> StoredTensor:
    path, tensor = source
    name, kind, offset = tensor.name, tensor.tensor_type, int(tensor.data_offset)
    shape = tuple(int(size) for size in reversed(tensor.shape))
    columns = shape[-1]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    row_bytes = columns // block * block_bytes
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(name.split(".")[-2])

    def read(at: Slices) -> np.ndarray:
        rows = at[0] if len(shape) > 1 else slice(0, 1)
        count = rows.stop - rows.start
        # Read the file, not the library's memory map, whose pages would stay and count as our memory.
        data = np.fromfile(path, np.uint8, count * row_bytes, offset=offset + rows.start * row_bytes)
        if data.size < count * row_bytes:
            raise OSError(f"{name} ends early")
        values = gguf.quants.dequantize(data.reshape(count, row_bytes), kind).reshape(count, columns)
        values = _unpermuted(values, config.head_width) if heads else values
        return values[:, at[1]] if len(shape) > 1 else values[0, at[0]]

    try:
        gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except (NotImplementedError, ValueError, KeyError) as error:
        raise UserError(f"{path}: {name} is stored as {kind.name}, which cannot be expanded: {error}") from None
    return StoredTensor(shape, np.dtype(np.float32), read)


def _unpermuted(rows: np.ndarray, head_width: int) -> np.ndarray:
    """Undoes the permutation of q and k rows.

    llama.cpp interleaves the two halves of each head, because its rotation pairs neighbours. Ours pairs half with half.
    """
    split = rows.reshape(-1, head_width // 2, 2, rows.shape[-1])
    return split.swapaxes(1, 2).reshape(rows.shape)
