"""The list of frequent tokens beside a model: read as it was written, and refused when it is not this model's."""

import json
import os

import numpy as np
import pytest

from lsjax.errors import UserError
from lsjax.io.draft_vocabulary import RankedTokens, has_list, list_path, read_list, write_list

RANKED = RankedTokens(np.array([7, 2, 5], np.int32), np.array([90, 30, 1]), 12, "a text")


def test_a_list_is_read_as_it_was_written(tmp_path):
    path = list_path(tmp_path)
    write_list(path, RANKED)
    assert read_list(path, 12).tolist() == [7, 2, 5]
    content = json.loads(path.read_text())
    assert content["counts"] == [90, 30, 1]
    assert content["source"] == "a text"
    assert content["sha256"] == "28d24a98907b4e3ba46474c6f658b0cd529cc3a6083e17b7957e19c44539e6d2"


def test_a_list_lies_in_the_models_folder_or_beside_its_file(tmp_path):
    assert list_path(tmp_path) == tmp_path / "draft_vocabulary.json"
    assert list_path(tmp_path / "a.gguf") == tmp_path / "a.gguf.draft_vocabulary.json"
    assert not has_list(tmp_path)
    write_list(list_path(tmp_path), RANKED)
    assert has_list(tmp_path)
    assert not has_list("")
    assert not has_list("some/model")
    with pytest.raises(UserError, match="some/model is a name on the Hub: give the path of a list"):
        list_path("some/model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 13}, "is of another model: its vocab_size is 13, this model's 12"),
        ({"ids": [7, 5, 2]}, "is damaged: its ids do not have the SHA-256"),
        ({"ids": []}, "is empty"),
        ({"ids": [7, 7, 5]}, "holds id 7 twice"),
        ({"ids": [7, 12, 5]}, r"holds id 12, outside the vocabulary 0\.\.11"),
        ({"ids": [7, -2, 5]}, r"holds id -2, outside the vocabulary 0\.\.11"),
        ({"ids": [7, "2", 5]}, "holds '2', which is no token id"),
        ({"ids": 7}, 'must hold "ids"'),
    ],
)
def test_a_list_that_is_not_this_models_is_refused(tmp_path, change, message):
    path = list_path(tmp_path)
    write_list(path, RANKED)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message) as caught:
        read_list(path, 12)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_half_a_list_is_never_left(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_list(list_path(tmp_path), RANKED)
    assert list(tmp_path.iterdir()) == []
