"""Writes recorded models as GGUF files with the `gguf` library, as llama.cpp's converter does."""

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

from tests.helpers.recorded import RECORDED


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Permutes q or k as llama.cpp's converter does: rows i and i + H/2 of a head become neighbours."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, variant: str, kind: str = "F32", fields=(), without=(), tensors=()) -> Path:
    """Writes a recorded model as GGUF, with extra `fields` and `tensors`, and without those named in `without`."""
    config = json.loads((RECORDED / variant / "config.json").read_text())
    tokenizer = json.loads((RECORDED / variant / "tokenizer.json").read_text())
    fields = dict(fields)
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", "llama"))
    rope = config.get("rope_parameters") or config["rope_scaling"] | {"rope_theta": config["rope_theta"]}
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    controls = {token["content"] for token in tokenizer["added_tokens"]}
    values = {
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.key_length": config["head_dim"],
        "llama.attention.value_length": config["head_dim"],
        "llama.rope.dimension_count": config["head_dim"],
        "llama.rope.freq_base": float(rope["rope_theta"]),
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [3 if token in controls else 1 for token in vocabulary],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in tokenizer["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    for name, value in (values | fields).items():
        if name not in without:
            add_field(writer, name, value)
    stored = {}
    for name, weight in load_file(RECORDED / variant / "model.safetensors").items():
        for heads, projection in ((config["num_attention_heads"], "q_proj"), (config["num_key_value_heads"], "k_proj")):
            weight = permute(weight, heads) if projection in name else weight
        stored[gguf_name(name, config["num_hidden_layers"])] = weight
    for name, weight in (stored | dict(tensors)).items():
        if name not in without:
            add_tensor(writer, name, weight, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_field(writer: gguf.GGUFWriter, name: str, value) -> None:
    """Adds a metadata field; its Python type decides the GGUF type."""
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    add[type(value)](name, value)


def add_tensor(writer: gguf.GGUFWriter, name: str, weight: np.ndarray, kind: str) -> None:
    """Adds a tensor, quantised as `kind` where its shape allows blocks."""
    blocks = weight.ndim > 1 and (kind == "F16" or weight.shape[-1] % 32 == 0)
    kind = gguf.GGMLQuantizationType[kind if blocks else "F32"]
    if kind.name == "F32":
        writer.add_tensor(name, weight.astype(np.float32))
    elif kind.name == "F16":
        writer.add_tensor(name, weight.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)


def gguf_name(name: str, layers: int) -> str:
    """Returns the GGUF name by the library's own table, which llama.cpp's converter uses."""
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers).get_name(name, try_suffixes=(".weight",))
