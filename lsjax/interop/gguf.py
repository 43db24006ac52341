"""GGUF files of llama.cpp: any Llama in any quantisation that the `gguf` library can expand."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lsjax.config import ModelConfig, RopeScaling, check_model
from lsjax.errors import UserError
from lsjax.interop.gguf_tokenizer import gguf_tokenizer
from lsjax.interop.layout import Slices
from lsjax.interop.source import FileSource
from lsjax.interop.tensors import StoredTensor
from lsjax.model.rope import inverse_frequencies

_MAGIC = b"GGUF"
# GGUF name -> Hugging Face name.
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
_ROPE_FACTORS = "rope_freqs.weight"
# GGUF keeps the resulting factors of Llama 3's frequency scaling, not its settings; these are all published ones'.
_LLAMA3_SETTINGS = {"low_frequency_factor": 1.0, "high_frequency_factor": 4.0, "original_context_length": 8192}


def is_gguf(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == _MAGIC
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def open_gguf(path: Path) -> FileSource:
    """Raises UserError that names what is damaged, missing or not a plain Llama."""
    path = Path(path)
    fields, tensors = _read_header(path)
    with _making_sense(path):
        config = _model_config(fields, tensors, str(path))
        weights = [tensor for name, tensor in tensors.items() if name != _ROPE_FACTORS]
        stored = {_huggingface_name(tensor.name): _stored_tensor(path, tensor, config) for tensor in weights}
    return FileSource(str(path), config, gguf_tokenizer(fields, str(path)), stored)


def read_gguf_config(path: Path) -> ModelConfig:
    with _making_sense(path):
        return _model_config(*_read_header(Path(path)), str(path))


@contextlib.contextmanager
def _making_sense(path: Path) -> Iterator[None]:
    """Fields may hold anything: a text for a number, a number for each layer, zero heads."""
    try:
        yield
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} has a field or tensor that makes no sense for a Llama: {error}") from None


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    try:
        reader = gguf.GGUFReader(path)
        if reader.endianess != gguf.GGUFEndian.LITTLE:
            raise ValueError("it is big-endian")
        return {name: _value(field) for name, field in reader.fields.items()}, {t.name: t for t in reader.tensors}
    except Exception as error:  # the library raises whatever it trips over
        raise UserError(f"{path} is damaged, or no GGUF file: {error}") from None


def _value(field: gguf.ReaderField) -> Any:
    """Long string arrays are decoded here: the library's own accessor takes seconds for a vocabulary."""
    if field.types and field.types[0] == gguf.GGUFValueType.ARRAY and field.types[-1] == gguf.GGUFValueType.STRING:
        return [bytes(field.parts[index]).decode("utf-8") for index in field.data]
    return field.contents()


def _model_config(fields: dict[str, Any], tensors: dict[str, gguf.ReaderTensor], where: str) -> ModelConfig:
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{where} holds the architecture {architecture!r}; lsjax reads llama")
    if fields.get("llama.expert_count"):
        raise UserError(f"{where} is a mixture of {fields['llama.expert_count']} experts; lsjax reads dense Llamas")

    def field(key: str, default: Any = None) -> Any:
        value = fields.get(f"llama.{key}", default)
        if value is None:
            raise UserError(f"{where} has no field llama.{key}")
        return value

    width, heads = field("embedding_length"), field("attention.head_count")
    if "token_embd.weight" not in tensors:
        raise UserError(f"{where} lacks the tensor token_embd.weight")
    head_width = field("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if field(key, head_width) != head_width:
            raise UserError(f"{where}: llama.{key} is {field(key)}, its heads have width {head_width}")
    config = ModelConfig(
        num_layers=field("block_count"),
        width=width,
        num_heads=heads,
        num_kv_heads=field("attention.head_count_kv", heads),
        head_width=head_width,
        feed_forward_width=field("feed_forward_length"),
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        context_length=field("context_length"),
        tie_embeddings="output.weight" not in tensors,
        rope_theta=_float32_text(field("rope.freq_base", 10000.0)),
        rope_scaling=_rope_scaling(fields, tensors, head_width, where),
        rms_norm_epsilon=_float32_text(field("attention.layer_norm_rms_epsilon")),
    )
    try:
        return check_model(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _float32_text(value: float) -> float:
    """1e-5 again, out of the float32 that the file keeps."""
    return float(str(np.float32(value)))


def _rope_scaling(fields: dict[str, Any], tensors: dict[str, gguf.ReaderTensor], head_width: int, where: str):
    # As llama.cpp does: a factor alone means linear, 0 means none, and old files have another key.
    kind = fields.get("llama.rope.scaling.type", "linear")
    factor = fields.get("llama.rope.scaling.factor", fields.get("llama.rope.scale_linear", 0.0))
    if kind == "linear" and factor not in (0.0, 1.0):
        return RopeScaling("linear", _float32_text(factor))
    if kind not in ("none", "linear"):
        raise UserError(f"{where}: rope scaling {kind!r}; lsjax has none, linear and llama3")
    if _ROPE_FACTORS not in tensors:
        return RopeScaling()
    factors = np.asarray(tensors[_ROPE_FACTORS].data, np.float64)
    scaling = RopeScaling("llama3", factor=round(float(factors.max()), 4), **_LLAMA3_SETTINGS)
    theta = _float32_text(fields.get("llama.rope.freq_base", 10000.0))
    if not _gives_factors(scaling, theta, head_width, factors):
        raise UserError(f"{where}: {_ROPE_FACTORS} is not Llama 3's frequency scaling by {scaling.factor:g}")
    return scaling


def _gives_factors(scaling: RopeScaling, theta: float, head_width: int, factors: np.ndarray) -> bool:
    plain = ModelConfig(head_width=head_width, rope_theta=theta)
    ratio = inverse_frequencies(plain) / inverse_frequencies(
        ModelConfig(head_width=head_width, rope_theta=theta, rope_scaling=scaling)
    )
    return ratio.shape == factors.shape and np.allclose(ratio, factors, rtol=1e-3)


def _huggingface_name(name: str) -> str:
    """ "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"; unknown names stay, and are reported."""
    stem, _, suffix = name.rpartition(".")
    block, _, rest = stem.partition(".")
    layer, _, kind = rest.partition(".")
    if block == "blk" and kind in _NAMES:
        return f"model.layers.{layer}.{_NAMES[kind]}.{suffix}"
    return f"{_NAMES[stem]}.{suffix}" if stem in _NAMES else name


def _stored_tensor(path: Path, tensor: gguf.ReaderTensor, config: ModelConfig) -> StoredTensor:
    name, kind, offset = tensor.name, tensor.tensor_type, int(tensor.data_offset)
    shape = tuple(int(size) for size in reversed(tensor.shape))
    columns = shape[-1]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    row_bytes = columns // block * block_bytes
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(name.split(".")[-2])

    def read(at: Slices) -> np.ndarray:
        rows = at[0] if len(shape) > 1 else slice(0, 1)
        count = rows.stop - rows.start
        # Not through the library's memory map: its pages would stay, and count as our memory.
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
    """llama.cpp interleaves the two halves of each q and k head (its rotation pairs neighbours); ours are apart."""
    split = rows.reshape(-1, head_width // 2, 2, rows.shape[-1])
    return split.swapaxes(1, 2).reshape(rows.shape)
