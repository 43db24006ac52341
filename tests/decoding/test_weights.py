"""Weights held once for decoding equal, bit by bit, those made of the parameters; and the other way round."""

import json

import jax
import numpy as np
import pytest

import lsjax
from lsjax.data.tokenizer import train_tokenizer
from lsjax.io.convert import convert
from lsjax.io.huggingface import write_huggingface
from tests.conftest import TINY, VARIED, random_params
from tests.helpers.recorded import RECORDED

PROMPTS = [[5, 9, 2], [300, 17, 41, 8, 250, 33]]
DRAFTING = lsjax.SelfSpeculative(2, 3, draft_weights="int8")


@pytest.fixture(scope="module", params=["huggingface", "tied", "workdir"])
def path(request, tmp_path_factory):
    path, config = tmp_path_factory.mktemp("model"), TINY if request.param == "tied" else VARIED
    write_huggingface(path, config, jax.device_get(random_params(config)), train_tokenizer(["some text"], 300))
    if request.param != "workdir":
        return path
    run = tmp_path_factory.mktemp("run")
    convert(path, run, "lsjax")
    return run


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype
        assert {s.data.shape for s in one.addressable_shards} == {s.data.shape for s in other.addressable_shards}


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("weights", [None, "int8"])
def test_the_same_weights_and_the_same_parameters(path, tensor, weights):
    made = lsjax.load(path, tensor=tensor)
    made = lsjax.quantize(made) if weights else made
    held = lsjax.load(path, tensor=tensor, weights=weights, for_decoding=True)
    assert_same(held.decoder_weights(), made.decoder_weights())
    assert held.in_int8 == made.in_int8 == bool(weights)
    assert_same(held.stack_params(), made.params)


def test_it_decodes_as_any_other(path):
    """`stack_params` gives its parameters, and int8 drafts are made of a few of its layers."""
    made, held = lsjax.load(path), lsjax.load(path, for_decoding=True)
    found, expected = (lsjax.generate(model, PROMPTS, 8, DRAFTING) for model in (held, made))
    assert found.tokens == expected.tokens
    assert [s["accepted"] for s in found.stats] == [s["accepted"] for s in expected.stats]
    np.testing.assert_array_equal(
        *(lsjax.forward(model.stack_params(), [PROMPTS[0]], model.config) for model in (held, made))
    )
    assert_same(lsjax.quantize(held).params, lsjax.quantize(made).params)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"weights": "int4"}, "weights is 'int4'; it must be int8, or left away"),
        ({"for_decoding": True, "dtype": "bfloat16"}, "dtype is 'bfloat16', but for_decoding holds weights in float32"),
        ({"for_decoding": True, "tensor": 3}, r"config.mesh.tensor \(3\) does not divide"),
    ],
)
def test_what_cannot_be_is_named(path, setting, message):
    with pytest.raises(lsjax.UserError, match=message):
        lsjax.load(path, **setting)


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "hf").mkdir()
    write_huggingface(tmp_path / "hf", TINY, random_params(TINY), train_tokenizer(["some text"], 300))
    convert(tmp_path / "hf", tmp_path / "run", "lsjax")
    data = [p for p in (tmp_path / "run" / "checkpoints" / "0" / "params").rglob("*") if p.is_file() and "d" in p.parts]
    max(data, key=lambda p: p.stat().st_size).unlink()
    with pytest.raises(lsjax.UserError, match=r"checkpoints/0 cannot be read; remove that folder"):
        lsjax.load(tmp_path / "run", for_decoding=True)


def test_a_checkpoint_of_another_shape_is_named(tmp_path):
    """Fewer layers than the checkpoint has would decode too, as another model."""
    (tmp_path / "hf").mkdir()
    write_huggingface(tmp_path / "hf", TINY, random_params(TINY), train_tokenizer(["some text"], 300))
    convert(tmp_path / "hf", tmp_path / "run", "lsjax")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["model"]["num_layers"] -= 1
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(lsjax.UserError, match=r"holds layers/.* of shape \(4, .*; config.json asks for \(3, "):
        lsjax.load(tmp_path / "run", for_decoding=True)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("bf16", "bfloat16"), ("fp16", "float16"), ("torch.float32", "float32"), ("auto", "float32"), (None, "float32")],
)
def test_a_dtype_goes_by_the_names_that_other_libraries_use(name, dtype):
    assert lsjax.load(RECORDED / "llama32", dtype=name).params["embed"].dtype == dtype


def test_int8_is_no_dtype_but_a_way_to_store_weights():
    with pytest.raises(lsjax.UserError, match=r'cut weights to whole numbers: load\(\.\.\., weights="int8"\)'):
        lsjax.load(RECORDED / "llama32", dtype="int8")
