"""Reads GGUF files that the `gguf` library writes, as llama.cpp's converter does, from recorded models."""

from pathlib import Path

import jax
import numpy as np
import pytest

import lsjax
from lsjax.io.open import read_model_config
from tests.helpers.gguf_files import write_gguf
from tests.helpers.recorded import RECORDED


def llama3_factors() -> np.ndarray:
    """Computes the factors of the recorded llama31 from the definition: wavelengths against 64 and 64/4 tokens."""
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
    """The error is within the rounding of the format: at most one step of the largest weight of a block of 32."""
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
    """GGUF stores only the factors. Published models all scale from 8,192 tokens, the recorded one from 64."""
    import lsjax.io.gguf as reader

    factors = {"rope_freqs.weight": llama3_factors()}
    path = write_gguf(tmp_path / "model.gguf", "llama31", tensors=factors)
    with pytest.raises(lsjax.UserError, match="is not Llama 3's frequency scaling"):
        lsjax.load(path)
    monkeypatch.setitem(reader._LLAMA3_SETTINGS, "original_context_length", 64)
    ours, theirs = lsjax.load(path), lsjax.load(RECORDED / "llama31")
    assert ours.config == theirs.config
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)


def test_llama32_factors_as_published(tmp_path):
    """Compares with Llama-3.2-1B's rope_freqs in llama.cpp's files (head width 64), an independent oracle."""
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
    "no heads": ({"fields": {"llama.attention.head_count": 0}}, "llama.attention.head_count is 0"),
    "a width for each layer": ({"fields": {"llama.feed_forward_length": [56, 56, 48]}}, "makes no sense for a Llama"),
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
