"""GGUF files written with the `gguf` library as llama.cpp's converter does, from models recorded with transformers."""

import json
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import lsjax
from lsjax.loading import read_model_config
from tests.interop.test_huggingface import RECORDED


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: pairs (i, i + H/2) become neighbours."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, variant: str, kind: str = "F32", fields=(), without=(), tensors=()) -> Path:
    """The recorded model as GGUF. `fields` and `tensors` are added last, `without` are left out."""
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
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    add[type(value)](name, value)


def add_tensor(writer: gguf.GGUFWriter, name: str, weight: np.ndarray, kind: str) -> None:
    blocks = weight.ndim > 1 and (kind == "F16" or weight.shape[-1] % 32 == 0)
    kind = gguf.GGMLQuantizationType[kind if blocks else "F32"]
    if kind.name == "F32":
        writer.add_tensor(name, weight.astype(np.float32))
    elif kind.name == "F16":
        writer.add_tensor(name, weight.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)


def gguf_name(name: str, layers: int) -> str:
    """By the library's own table, which llama.cpp's converter uses."""
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers).get_name(name, try_suffixes=(".weight",))


def llama3_factors() -> np.ndarray:
    """Of the recorded llama31, from the definition: wavelengths against 64 and 64/4 tokens."""
    half = 4
    wavelengths = 2 * np.pi * 5e5 ** (np.arange(half) / half)
    smooth = (64 / wavelengths - 1) / 3
    between = 1 / ((1 - smooth) / 8 + smooth)
    return np.where(wavelengths < 16, 1.0, np.where(wavelengths > 64, 8.0, between)).astype(np.float32)


@pytest.mark.parametrize("variant", ["smollm2", "multi_query"])
def test_the_same_parameters_as_from_hugging_face(variant, tmp_path):
    ours = lsjax.load(write_gguf(tmp_path / "model.gguf", variant))
    theirs = lsjax.load(RECORDED / variant)
    assert ours.config == theirs.config
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    text = "def main(): return 0  # \u00e9 \u4e2d <s>"
    assert ours.tokenizer.encode(text) == theirs.tokenizer.encode(text)
    assert ours.tokenizer.decode(ours.tokenizer.encode(text)) == text
    assert (ours.tokenizer.begin, ours.tokenizer.stop) == (theirs.tokenizer.begin, theirs.tokenizer.stop)


@pytest.mark.parametrize(("kind", "steps"), [("F16", 2048), ("Q8_0", 127), ("Q4_0", 8), ("Q5_1", 15)])
def test_quantised_weights_are_expanded(kind, steps, tmp_path):
    """Each within the rounding of its format: at most one step of the largest weight of its block of 32."""
    ours = lsjax.load(write_gguf(tmp_path / "model.gguf", "linear_scaling", kind, rope("linear", 4.0))).params
    theirs = lsjax.load(RECORDED / "linear_scaling").params
    errors = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / np.abs(b).max()), ours, theirs)
    assert max(jax.tree.leaves(errors)) <= 2 / steps
    assert errors["embed"] > 0
    assert errors["layers"]["attention"]["qkv"] > 0


def rope(kind: str, factor: float):
    return {"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": factor}


def test_linear_rope_scaling(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "linear_scaling", fields=rope("linear", 4.0))
    assert read_model_config(path) == read_model_config(RECORDED / "linear_scaling")


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"llama.rope.scaling.factor": 4.0}, "linear"),
        ({"llama.rope.scale_linear": 4.0}, "linear"),
        ({"llama.rope.scaling.factor": 1.0}, "none"),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, "none"),
    ],
)
def test_rope_factors_mean_what_they_mean_to_llama_cpp(fields, kind, tmp_path):
    scaling = read_model_config(write_gguf(tmp_path / "model.gguf", "smollm2", fields=fields)).rope_scaling
    assert scaling.kind == kind
    assert scaling.factor == (4.0 if kind == "linear" else 1.0)


@pytest.mark.parametrize(
    ("fields", "begins"),
    [
        ({"tokenizer.ggml.pre": "gpt-2"}, False),
        ({"tokenizer.ggml.pre": "llama-bpe"}, True),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, False),
        ({"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.add_bos_token": True}, True),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.bos_token_id": 2**32 - 1}, False),
    ],
)
def test_texts_begin_as_with_llama_cpp(fields, begins, tmp_path):
    tokenizer = lsjax.load(write_gguf(tmp_path / "model.gguf", "smollm2", fields=fields)).tokenizer
    assert (tokenizer.encode("a")[0] == 1) == begins


def test_llama3_rope_scaling_is_recognised_by_its_factors(tmp_path, monkeypatch):
    """GGUF keeps the factors only; published models all scale from 8,192 tokens, the recorded one from 64."""
    import lsjax.interop.gguf as reader

    factors = {"rope_freqs.weight": llama3_factors()}
    path = write_gguf(tmp_path / "model.gguf", "llama31", tensors=factors)
    with pytest.raises(lsjax.UserError, match="is not Llama 3's frequency scaling"):
        lsjax.load(path)
    monkeypatch.setitem(reader._LLAMA3_SETTINGS, "original_context_length", 64)
    ours, theirs = lsjax.load(path), lsjax.load(RECORDED / "llama31")
    assert ours.config == theirs.config
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)


def test_llama32_factors_as_published(tmp_path):
    """Llama-3.2-1B's rope_freqs, as llama.cpp's files carry them (head width 64): an oracle that is not ours."""
    from lsjax.config import ModelConfig, RopeScaling
    from lsjax.model.rope import inverse_frequencies

    scaling = RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    plain, scaled = (ModelConfig(head_width=64, rope_theta=5e5, rope_scaling=s) for s in (RopeScaling(), scaling))
    ratio = inverse_frequencies(plain) / inverse_frequencies(scaled)
    np.testing.assert_allclose(ratio, [1.0] * 15 + [1.6513293, 3.2922628, 9.666731] + [32.0] * 14, rtol=1e-5)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


BIAS = {"blk.0.attn_q.bias": np.zeros(36, np.float32)}
BAD = {
    "another architecture": ({"fields": {"general.architecture": "qwen2"}}, "architecture 'qwen2'"),
    "experts": ({"fields": {"llama.expert_count": 8}}, "mixture of 8 experts"),
    "an unknown rope type": ({"fields": rope("yarn", 4.0)}, "rope scaling 'yarn'"),
    "biases": ({"tensors": BIAS}, "self_attn.q_proj.bias"),
    "a missing tensor": ({"without": ["blk.1.ffn_down.weight"]}, "lacks the tensor model.layers.1.mlp.down_proj"),
    "a missing field": ({"without": ["llama.block_count"]}, "no field llama.block_count"),
    "an unknown tokenizer": ({"fields": {"tokenizer.ggml.model": "bert"}}, "tokenizer.ggml.model is 'bert'"),
    "an unknown way to cut words": ({"fields": {"tokenizer.ggml.pre": "qwen2"}}, "tokenizer.ggml.pre is 'qwen2'"),
    "no stop token": ({"without": ["tokenizer.ggml.eos_token_id"]}, "no field tokenizer.ggml.eos_token_id"),
    "no heads": ({"fields": {"llama.attention.head_count": 0}}, "makes no sense for a Llama"),
    "a width for each layer": ({"fields": {"llama.feed_forward_length": [56, 56, 56]}}, "makes no sense for a Llama"),
    "a stop token out of range": ({"fields": {"tokenizer.ggml.eos_token_id": 9999}}, "is not one of its"),
    "no way to cut words": ({"without": ["tokenizer.ggml.pre"]}, "tokenizer.ggml.pre is None"),
    "partial rotation": ({"fields": {"llama.rope.dimension_count": 2}}, "llama.rope.dimension_count is 2"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_refused(what, tmp_path):
    changes, message = BAD[what]
    path = write_gguf(tmp_path / "model.gguf", "smollm2", **changes)
    with pytest.raises(lsjax.UserError) as raised:
        lsjax.load(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


def test_damaged_files_are_refused(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "smollm2")
    cut(path)
    with pytest.raises(lsjax.UserError, match=r"model\.gguf is damaged"):
        lsjax.load(path)
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(lsjax.UserError, match="not GGUF"):
        lsjax.load(tmp_path / "text.gguf")
