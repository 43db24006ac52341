"""Reads GGUF files whose metadata is incomplete, odd or split, as files in the wild are.

The wanted values are those of llama.cpp (src/llama-vocab.cpp, gguf.cpp) and of sentencepiece 0.2.3.
"""

from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from tokenizers import pre_tokenizers

import lsjax
from lsjax.io.gguf_tokenizer import gguf_tokenizer
from lsjax.io.open import open_model, read_model_config
from tests.helpers.gguf_files import write_gguf
from tests.helpers.recorded import RECORDED

WORDS = ("▁hello", "▁world", "</s", "<s", "<unk")


def sentencepiece_fields(*more: str, types=(), **changes) -> dict:
    """Returns the fields of a vocabulary of bytes, letters and WORDS, with pieces that could spell control tokens."""
    words = [word[:end] for word in WORDS for end in range(1, len(word) + 1)] + ["s>", "/s>", "k>", "nk>", ">"]
    words = list(dict.fromkeys(words))
    words = [w for w in words if len(w) > 1] + sorted({letter for word in words for letter in word})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *more]
    fields = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-float(rank) for rank in range(len(tokens) - 259)],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(words) + list(types or [1] * len(more)),
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items() if value is not None}


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("hello</s>", ["▁hello", "</s", ">"]),
        ("</s>", ["▁", "</s", ">"]),
        ("a<s>b", ["▁", "<0x61>", "<s", ">", "<0x62>"]),
        ("x<unk>y", ["▁", "<0x78>", "<unk", ">", "<0x79>"]),
        ("hello  world", ["▁hello", "▁", "▁world"]),
        ("<0x41>", ["▁", "<", "<0x30>", "<0x78>", "<0x34>", "<0x31>", ">"]),
        ("é", ["▁", "<0xC3>", "<0xA9>"]),
        (" hello", ["▁", "▁hello"]),
    ],
)
def test_text_never_merges_into_a_control_or_unknown_token(text, pieces):
    """The pieces are those of sentencepiece 0.2.3 for this vocabulary."""
    fields = sentencepiece_fields()
    tokenizer = gguf_tokenizer(fields, "test")
    ids = tokenizer.encode(text)
    assert [fields["tokenizer.ggml.tokens"][index] for index in ids] == ["<s>", *pieces]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, 0]) == text  # the unknown token has no text


def test_ids_that_the_file_does_not_give_are_those_of_llama_cpp():
    for absent in (None, 2**32 - 1):
        tokenizer = gguf_tokenizer(sentencepiece_fields(bos_token_id=absent, eos_token_id=absent), "test")
        assert tokenizer.encode("hello")[0] == 1
        assert tokenizer.stop == (2,)


@pytest.mark.parametrize(
    ("more", "types", "stop"),
    [
        (["<|im_start|>", "<|im_end|>"], [3, 3], [1]),
        (["<|im_end|>", "<|eot_id|>", "<end_of_turn>"], [1, 4, 3], [0, 1, 2]),
        (["<eos>", "<EOT>"], [1, 1], []),
        (["<eos>", "<EOT>"], [3, 3], [0, 1]),
    ],
)
def test_tokens_that_end_a_turn_are_known_by_their_texts(more, types, stop):
    tokenizer = gguf_tokenizer(sentencepiece_fields(*more, types=types), "test")
    first = tokenizer.vocab_size - len(more)
    assert tokenizer.stop == (2, *(first + index for index in stop))
    assert all(tokenizer.decode([first + index]) == "" for index in stop)


def test_a_field_for_the_end_of_a_turn_comes_before_the_texts():
    fields = sentencepiece_fields("<|im_end|>", "<x>", types=[3, 3])
    tokenizer = gguf_tokenizer(fields | {"tokenizer.ggml.eot_token_id": 288}, "test")
    assert tokenizer.stop[:2] == (2, 288)


def test_a_text_that_stands_twice_is_refused():
    with pytest.raises(lsjax.UserError, match=r"holds '▁hello' twice, with the ids \d+ and \d+"):
        gguf_tokenizer(sentencepiece_fields("▁hello"), "test")
    gguf_tokenizer(sentencepiece_fields("", "", types=[5, 5]), "test")  # llama.cpp names empty tokens by their ids


def test_a_vocabulary_of_single_bytes_needs_no_merges():
    """GGUFWriter writes no empty list, so such a file has no field for them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fields = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [*letters, "<|end|>"],
        "token_type": [1] * 256 + [3],
        "eos_token_id": 256,
    }
    fields = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    assert gguf_tokenizer(fields, "test").encode("a1 ") == [letters.index(letter) for letter in "a1Ġ"]
    fields["tokenizer.ggml.tokens"][256:] = ["<|end|>", "Ġa"]
    fields["tokenizer.ggml.token_type"].append(1)
    with pytest.raises(lsjax.UserError, match=r"test has no field tokenizer\.ggml\.merges"):
        gguf_tokenizer(fields, "test")


@pytest.mark.parametrize("name", ["llama3", "llama-v3", "falcon3", "lfm2"])
def test_other_names_of_llama_3s_rule(name, tmp_path):
    usual = write_gguf(tmp_path / "a.gguf", "smollm2", fields={"tokenizer.ggml.pre": "llama-bpe"})
    other = write_gguf(tmp_path / "b.gguf", "smollm2", fields={"tokenizer.ggml.pre": name})
    text = "I'LL be 12345 there...  \n\n x"
    assert open_model(other).tokenizer.encode(text) == open_model(usual).tokenizer.encode(text)
    assert open_model(other).tokenizer.begin == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smaug-bpe", ["I", "'LL", " be", " ", "123", "45", "a", "..."]),
        ("default", ["I", "'", "LL", " be", " ", "123", "45", "a", "..."]),
        ("smollm", ["I", "'", "LL", " be", " ", "1", "2", "3", "4", "5", "a", "..."]),
    ],
)
def test_a_rule_cuts_text_as_llama_cpp_does(name, words, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "smollm2", fields={"tokenizer.ggml.pre": name})
    tokenizer = open_model(path).tokenizer
    cuts = tokenizer.backend.pre_tokenizer.pre_tokenize_str("I'LL be 12345a...")
    assert [word.replace("Ġ", " ") for word, _ in cuts] == words
    assert tokenizer.begin is None


@pytest.mark.parametrize("key", ["attention.head_count_kv", "attention.head_count", "feed_forward_length"])
def test_an_array_of_equal_numbers_is_that_number(key, tmp_path):
    plain = read_model_config(write_gguf(tmp_path / "plain.gguf", "smollm2"))
    value = {"attention.head_count_kv": 3, "attention.head_count": 9, "feed_forward_length": 56}[key]
    path = write_gguf(tmp_path / "model.gguf", "smollm2", fields={f"llama.{key}": [value] * 3})
    assert read_model_config(path) == plain
    path = write_gguf(tmp_path / "model.gguf", "smollm2", fields={f"llama.{key}": [value, value, 3 * value]})
    with pytest.raises(lsjax.UserError, match="differs between layers"):
        read_model_config(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 3.0),
        ("embedding_length", 36.0),
        ("attention.head_count", "9"),
        ("context_length", True),
        ("rope.freq_base", "1e4"),
        ("attention.layer_norm_rms_epsilon", True),
        ("rope.scaling.factor", "4"),
    ],
)
def test_a_field_of_the_wrong_type_is_named(key, value, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "smollm2", fields={f"llama.{key}": value})
    with pytest.raises(lsjax.UserError, match=f"llama.{key} must be"):
        read_model_config(path)


def move_tensor(path: Path, name: str, by: int) -> None:
    """Adds to the offset of a tensor in the file's list of tensors."""
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    place = tensor.field.offset + 8 + len(name) + 4 + 8 * len(tensor.shape) + 4
    data = bytearray(path.read_bytes())
    offset = int.from_bytes(data[place : place + 8], "little")
    data[place : place + 8] = (offset + by).to_bytes(8, "little")
    path.write_bytes(data)


@pytest.mark.parametrize("by", [4, 32, -32])
def test_tensors_that_do_not_follow_each_other_are_refused(by, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "smollm2")
    open_model(path)
    move_tensor(path, "blk.1.ffn_up.weight", by)
    with pytest.raises(lsjax.UserError, match=r"is damaged.*its tensor blk\.1\.ffn_up\.weight starts at byte"):
        open_model(path)


def split(folder: Path, count: int = 3, **changes) -> list[Path]:
    """Writes the recorded model as one split GGUF: fields and no tensors first, as gguf-split may, then the tensors."""
    whole = write_gguf(folder / "whole.gguf", "smollm2")
    reader = gguf.GGUFReader(whole)
    total = len(reader.tensors)
    fields = {"split.count": count, "split.tensors.count": total} | changes
    names = sorted(tensor.name for tensor in reader.tensors)
    paths = [
        write_gguf(folder / f"m-00001-of-{count:05}.gguf", "smollm2", fields=fields | {"split.no": 0}, without=names)
    ]
    for number in range(1, count):
        paths.append(folder / f"m-{number + 1:05}-of-{count:05}.gguf")
        writer = gguf.GGUFWriter(paths[-1], "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        for tensor in reader.tensors[number - 1 :: count - 1]:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    whole.unlink()
    return paths


def test_any_file_of_a_split_gguf_opens_all_of_them(tmp_path):
    wanted = lsjax.load(RECORDED / "smollm2").params
    for path in split(tmp_path):
        jax.tree.map(np.testing.assert_array_equal, lsjax.load(path).params, wanted)


def test_a_split_gguf_that_is_not_whole_is_refused(tmp_path):
    first, second, third = split(tmp_path)
    bytes_of_third = third.read_bytes()
    third.unlink()
    for path in (first, second):
        with pytest.raises(
            lsjax.UserError, match=r"is one of the 3 files of a split GGUF; .*m-00003-of-00003\.gguf is missing"
        ):
            lsjax.load(path)
    third.write_bytes(second.read_bytes())
    with pytest.raises(lsjax.UserError, match=r"m-00003-of-00003\.gguf is not file 3 of 3"):
        lsjax.load(first)
    third.write_bytes(bytes_of_third)
    renamed = first.rename(tmp_path / "model.gguf")
    with pytest.raises(lsjax.UserError, match=r"its name is not NAME-00001-of-00003\.gguf"):
        lsjax.load(renamed)
    first, *_ = split(tmp_path, **{"split.tensors.count": 99})
    with pytest.raises(lsjax.UserError, match=r"hold \d+ tensors, not 99"):
        lsjax.load(first)
