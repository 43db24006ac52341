"""The model that ships: found by name from anywhere, and what its card says."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

import lsjax
from lsjax.io.base_model import describe_base
from lsjax.io.open import open_model
from lsjax.io.shipped import shipped_model, shipped_models
from tests.helpers.recorded import copy_of

NAME = "python-20m"


@pytest.fixture(scope="module")
def model():
    return lsjax.load(NAME)


def test_it_is_found_by_name_from_any_folder(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    assert lsjax.read_model_config(NAME) == model.config
    assert NAME in shipped_models()


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    copy_of("llama32", tmp_path / NAME)
    monkeypatch.chdir(tmp_path)
    assert lsjax.read_model_config(NAME) == lsjax.read_model_config(tmp_path / NAME)


def test_as_the_base_of_an_adapter_it_keeps_its_name(tmp_path, monkeypatch):
    """A run with LoRA opens its base again, from whatever folder it is started in."""
    monkeypatch.chdir(tmp_path)
    assert describe_base(NAME, open_model(NAME)).path == NAME


def test_another_name_is_one_line_that_lists_those_that_ship(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(lsjax.UserError, match=r"python-30m: it does not exist \(those that ship: python-20m\)"):
        lsjax.load("python-30m")


def test_it_has_learned_python(model):
    """Reads a file of the standard library, which it has not seen: far better than by the frequency of its tokens."""
    tokens = np.array(model.tokenizer.encode(Path(re.__file__).read_text())[:512])
    logits = np.asarray(lsjax.forward(model.stack_params(), tokens[None, :-1], model.config)[0], np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, tokens[1:, None], -1)[:, 0]
    counts = np.bincount(tokens, minlength=model.config.vocab_size)[tokens] / len(tokens)
    assert losses.mean() < -np.log(counts).mean() < 6.0


def test_the_card_states_size_and_licences(model):
    card = (shipped_model(NAME) / "README.md").read_text()
    count = sum(np.prod(tensor.shape) for tensor in jax.tree.leaves(model.stack_params()))
    assert f"{count:,} parameters" in card
    for word in ("Licence", "Limits", "tokens", "hours"):
        assert word in card


def test_it_is_small_enough_for_a_repository():
    folder = shipped_model(NAME).parent
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 42e6
