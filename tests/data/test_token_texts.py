"""The text of one token, as it stands inside a text."""

import pytest
import tokenizers
from tokenizers import decoders, models

from lsjax.data.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def byte_level():
    return train_tokenizer(["the cat sat on the mat, the cat sat"] * 9, 300)


@pytest.fixture(scope="module")
def sentencepiece():
    """Returns a tokenizer that decodes as those of Llama 1 and 2 do: the first space of a text is dropped."""
    words = ["<s>", "▁the", "the", "▁", "<0xE7>", "<0x8C>", "<0xAB>"]
    backend = tokenizers.Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="▁"))
    backend.add_special_tokens(["<s>"])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend, stop=(0,))


def test_the_texts_of_tokens_make_up_the_text(byte_level):
    ids = byte_level.encode(" the cat sat")
    assert "".join(map(byte_level.describe, ids[1:])) == " the cat sat"
    assert byte_level.describe(ids[0]) == "<|begin_of_text|>"


def test_a_space_before_a_word_is_part_of_its_token(sentencepiece):
    assert sentencepiece.decode([1]) == "the"
    assert [sentencepiece.describe(index) for index in range(4)] == ["<s>", " the", "the", " "]


def test_a_part_of_a_character_is_a_replacement_sign(sentencepiece, byte_level):
    assert sentencepiece.describe(4) == "\ufffd"
    first = byte_level.encode("猫")[1]
    assert byte_level.describe(first) == "\ufffd"


def test_an_id_beyond_the_vocabulary_is_shown_as_a_number(byte_level):
    assert byte_level.describe(319) == "<319>"
