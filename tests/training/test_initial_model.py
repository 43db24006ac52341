"""Runs that start from a model: from its weights, with its tokenizer, or not at all."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import lsjax
from lsjax.data.pipeline import training_batches
from lsjax.evaluation.exits import exit_profile
from lsjax.io.convert import convert
from tests.helpers.recorded import RECORDED, copy_of, edit_tensors
from tests.helpers.runs import continuing

pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.fixture(scope="module")
def lsjax_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert(RECORDED / "llama32", folder, "lsjax")
    return folder


@pytest.mark.parametrize("kind", ["huggingface", "lsjax"])
def test_the_first_step_has_the_models_own_loss(kind, tiny_run, lsjax_folder, tmp_path):
    path = RECORDED / "llama32" if kind == "huggingface" else lsjax_folder
    config = continuing(tiny_run, path)
    lsjax.train(config, tmp_path / "run", verbose=False)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    model = lsjax.load(path)
    t = config.training
    batch = next(training_batches(tmp_path / "run" / "data", t.batch_size, t.sequence_length, t.seed))
    own = exit_profile(model.params, [batch], model.config)
    np.testing.assert_allclose(first["final_loss"], own.loss[-1], rtol=1e-4)

    trained = lsjax.load(tmp_path / "run")
    assert trained.step == 4
    assert trained.tokenizer.backend.to_str() == model.tokenizer.backend.to_str()
    assert trained.tokenizer.stop == model.tokenizer.stop
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), trained.params, model.params)
    assert min(jax.tree.leaves(moved)) > 0


def test_a_resumed_run_needs_its_checkpoint_only_for_weights(tiny_run, lsjax_folder, tmp_path):
    """Resuming goes on from the checkpoint, not from the initial model again."""
    config = continuing(tiny_run, lsjax_folder)
    done = lsjax.train(config, tmp_path / "run", verbose=False)
    again = lsjax.train(config, tmp_path / "run", verbose=False)
    jax.tree.map(np.testing.assert_array_equal, done.params, again.params)


def test_a_shape_that_is_not_the_models_is_named(tiny_run, tmp_path):
    config = dataclasses.replace(tiny_run, initial_model=str(RECORDED / "llama32"))
    with pytest.raises(lsjax.UserError, match=r"config\.model\.num_layers is 4, that of config\.initial_model 3"):
        lsjax.train(config, tmp_path / "run", verbose=False)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_damaged_initial_model_leaves_no_run(tiny_run, tmp_path):
    config = continuing(tiny_run, RECORDED / "llama32")
    folder = copy_of("llama32", tmp_path / "model")
    edit_tensors(folder, lambda tensors: tensors.pop("model.norm.weight"))
    config = dataclasses.replace(config, initial_model=str(folder))
    with pytest.raises(lsjax.UserError, match=r"lacks the tensor model\.norm\.weight"):
        lsjax.train(config, tmp_path / "run", verbose=False)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_converted_model_is_no_run(tiny_run, lsjax_folder):
    with pytest.raises(lsjax.UserError, match=r"holds a model, not a run: start from it with config\.initial_model="):
        lsjax.train(tiny_run, lsjax_folder, verbose=False)
