"""Compares GGUF files with those of an independent writer. tests/parity/test_llama_cpp.py gives them to llama.cpp."""

import json

import gguf
import jax
import numpy as np
import pytest

import lsjax
import lsjax.io.gguf as reader
from lsjax.io.convert import convert
from lsjax.io.exit_adapter import write_exit_adapter
from lsjax.io.gguf_vocabulary import byte_level_vocabulary, placeholder_vocabulary
from lsjax.io.gguf_writer import Kind, write_gguf
from lsjax.model.exit_adapter import ExitAdapter
from tests.helpers.gguf_files import write_gguf as write_expected
from tests.helpers.recorded import RECORDED, copy_of
from tests.io.test_gguf import llama3_factors, rope

TEXT = "def main(): return 0  # \u00e9 \u4e2d <s>"
# What the independent writer must be told, because it does not read it from config.json.
BESIDE = {
    "smollm2": {},
    "multi_query": {},
    "linear_scaling": {"fields": rope("linear", 4.0)},
    "llama31": {"tensors": {"rope_freqs.weight": llama3_factors()}},
}


def tensors_of(path) -> dict[str, tuple]:
    """Returns type and content of every tensor in a file."""
    found = gguf.GGUFReader(path).tensors
    return {t.name: (t.tensor_type, tuple(t.shape.tolist()), np.array(t.data)) for t in found}


@pytest.mark.parametrize("variant", BESIDE)
def test_the_tensors_are_those_of_an_independent_writer(variant, tmp_path):
    convert(RECORDED / variant, tmp_path / "ours.gguf", "gguf", "float32")
    expected = tensors_of(write_expected(tmp_path / "theirs.gguf", variant, **BESIDE[variant]))
    ours = tensors_of(tmp_path / "ours.gguf")
    assert set(ours) == set(expected)
    for name, (kind, shape, data) in expected.items():
        assert ours[name][:2] == (kind, shape), name
        np.testing.assert_allclose(ours[name][2], data, rtol=1e-6 if name == "rope_freqs.weight" else 0)


@pytest.mark.parametrize("variant", BESIDE)
def test_there_and_back_keeps_the_model(variant, tmp_path, monkeypatch):
    monkeypatch.setitem(reader._LLAMA3_SETTINGS, "original_context_length", 64)  # published Llamas have 8,192
    convert(RECORDED / variant, tmp_path / "model.gguf", "gguf")
    ours, before = lsjax.load(tmp_path / "model.gguf"), lsjax.load(RECORDED / variant)
    assert ours.config == before.config
    jax.tree.map(np.testing.assert_array_equal, ours.params, before.params)
    assert ours.tokenizer.encode(TEXT) == before.tokenizer.encode(TEXT)
    assert ours.tokenizer.decode(ours.tokenizer.encode(TEXT)) == TEXT
    assert (ours.tokenizer.begin, ours.tokenizer.stop) == (before.tokenizer.begin, before.tokenizer.stop)
    assert ours.tokenizer.special_tokens == before.tokenizer.special_tokens


def test_the_shipped_model_there_and_back(tmp_path):
    """It is stored in bfloat16, and so are the matrices in the file."""
    convert("python-20m", tmp_path / "model.gguf", "gguf")
    ours, before = lsjax.load(tmp_path / "model.gguf"), lsjax.load("python-20m")
    assert ours.config == before.config
    jax.tree.map(np.testing.assert_array_equal, ours.params, before.params)
    assert ours.tokenizer.encode(TEXT) == before.tokenizer.encode(TEXT)
    kinds = {name: kind for name, (kind, *_) in tensors_of(tmp_path / "model.gguf").items()}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {Kind.F32}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {Kind.BF16}


@pytest.mark.parametrize(("kind", "error"), [(Kind.BF16, 2**-8), (Kind.Q8_0, 1 / 127)])
def test_narrower_types_round(kind, error, tmp_path):
    model = lsjax.load("python-20m")
    params = jax.tree.map(lambda a: a * 1.01, model.params)  # no longer bfloat16
    vocabulary = byte_level_vocabulary(model.tokenizer, model.config.vocab_size, "it")
    write_gguf(tmp_path / "model.gguf", model.config, params, vocabulary, kind)
    ours = lsjax.load(tmp_path / "model.gguf").params
    errors = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / np.abs(b).max()), ours, params)
    assert errors["final_norm"]["scale"] == 0
    assert 0 < errors["embed"] <= error
    assert 0 < errors["layers"]["attention"]["qkv"] <= error


@pytest.mark.parametrize(("added", "last", "type_"), [(0, "[PAD287]", 5), (30, "<x287>", 4)])
def test_every_row_of_the_embedding_has_one_token(added, last, type_, tmp_path):
    """The tokenizer has 270 tokens, or 300 with those that no row belongs to, and the embedding 288 rows."""
    folder = copy_of("smollm2", tmp_path / "model")
    (folder / "added_tokens.json").write_text(json.dumps({f"<x{index}>": index for index in range(270, 270 + added)}))
    convert(folder, tmp_path / "model.gguf", "gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    tokens, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    assert (len(tokens), len(types)) == (288, 288)
    assert (tokens[3], types[3]) == ("<eot>", 3)
    assert (tokens[287], types[287]) == (last, type_)


def edited(tmp_path, name: str, edit) -> None:
    """Makes a copy of a recorded model and changes one of its JSON files."""
    path = copy_of("smollm2", tmp_path / "model") / name
    tree = json.loads(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))


def strip_around_eot(tree):
    tree["added_tokens"][3]["lstrip"] = True


BAD = {
    "another kind": (lambda tree: tree["model"].update(byte_fallback=True, unk_token="<unk>"), "sets unk_token"),
    "a normalizer": (lambda tree: tree.update(normalizer={"type": "NFC"}), "is not byte-level BPE"),
    "a decoder": (lambda tree: tree.update(decoder=None), "is not byte-level BPE"),
    "words": (lambda tree: tree["pre_tokenizer"].update(add_prefix_space=True), "cuts text into words by a rule"),
    "whole words": (lambda tree: tree["model"].update(ignore_merges=True), "cuts text into words by a rule"),
    "no merges": (lambda tree: tree["model"].update(merges=[]), "has no merges"),
    "white space": (strip_around_eot, "its token '<eot>' looks at the characters around it"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_tokenizer_that_gguf_cannot_express_is_refused(what, tmp_path):
    edit, message = BAD[what]
    edited(tmp_path, "tokenizer.json", edit)
    with pytest.raises(lsjax.UserError, match=message):
        convert(tmp_path / "model", tmp_path / "out.gguf", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_more_stop_tokens_than_a_file_names_are_refused(tmp_path):
    edited(tmp_path, "generation_config.json", lambda tree: tree.update(eos_token_id=[5, 6, 7, 8]))
    with pytest.raises(lsjax.UserError, match="has 4 tokens that end a text, and a GGUF file can name only three"):
        convert(tmp_path / "model", tmp_path / "out.gguf", "gguf")
    with pytest.raises(lsjax.UserError, match="has 4 tokens that end a text"):
        placeholder_vocabulary(10, (1, 2, 3, 4), "it")


def test_three_stop_tokens_are_kept(tmp_path):
    edited(tmp_path, "generation_config.json", lambda tree: tree.update(eos_token_id=[7, 2, 9]))
    convert(tmp_path / "model", tmp_path / "out.gguf", "gguf")
    assert lsjax.load(tmp_path / "out.gguf").tokenizer.stop[:3] == (7, 2, 9)


def test_a_chat_template_is_kept(tmp_path):
    template = "{{ bos_token }}{% for message in messages %}[{{ message.content }}]{% endfor %}"
    edited(tmp_path, "tokenizer_config.json", lambda tree: tree.update(chat_template=template))
    convert(tmp_path / "model", tmp_path / "out.gguf", "gguf")
    talk = [{"role": "user", "content": "hi"}]
    ours, before = (lsjax.load(tmp_path / name).tokenizer.encode_chat(talk) for name in ("out.gguf", "model"))
    assert ours == before
    assert len(before) > 3


def test_an_exit_adapter_is_refused(tmp_path):
    folder = copy_of("smollm2", tmp_path / "model")
    width = lsjax.load(folder).config.width
    write_exit_adapter(folder, ExitAdapter(1, np.zeros((width, width), np.float32)))
    with pytest.raises(lsjax.UserError, match="has an adapter for the drafts of exit 1, which GGUF has no place for"):
        convert(folder, tmp_path / "out.gguf", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_nothing_is_overwritten_or_half_written(tmp_path, monkeypatch):
    (tmp_path / "mine.gguf").write_text("keep")
    with pytest.raises(lsjax.UserError, match="exists; give a new file"):
        convert(RECORDED / "smollm2", tmp_path / "mine.gguf", "gguf")
    assert (tmp_path / "mine.gguf").read_text() == "keep"
    model = lsjax.load(RECORDED / "smollm2")
    vocabulary = placeholder_vocabulary(model.config.vocab_size, model.tokenizer.stop, "it")
    with pytest.raises(lsjax.UserError, match=r"Q8_0 stores blocks of 32 numbers, but .* has rows of 36"):
        write_gguf(tmp_path / "out.gguf", model.config, model.params, vocabulary, Kind.Q8_0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(lsjax.UserError, match=r"cannot write .*out\.gguf: No space left on device"):
        convert(RECORDED / "smollm2", tmp_path / "out.gguf", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.gguf"]
