"""Compares with PyTorch transformers on the same weights: reading, writing, and a round trip."""

import logging
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax  # noqa: E402

import lsjax  # noqa: E402
from lsjax.io.convert import convert  # noqa: E402
from tests.helpers.llamas import VARIANTS, make_llama, run_llama  # noqa: E402

TOKENS = np.random.default_rng(0).integers(0, 288, (2, 100))


def assert_close(ours, theirs, relative=1e-4):
    """Asserts that the largest error is below `relative` times the largest value."""
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < relative * np.abs(theirs).max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_states_and_greedy_tokens_agree(variant, tmp_path):
    theirs = make_llama(tmp_path, variant)
    ours = lsjax.load(tmp_path)
    logits, states = run_llama(theirs, TOKENS)
    assert_close(np.asarray(lsjax.forward(ours.params, TOKENS, ours.config)), logits)
    for layer, (mine, other) in enumerate(
        zip(np.asarray(lsjax.hidden_states(ours.params, TOKENS, ours.config)), states, strict=True)
    ):
        assert_close(mine, other), layer

    prompt = TOKENS[:1, :20]
    expected = theirs.generate(torch.as_tensor(prompt), max_new_tokens=40, do_sample=False)[0, 20:].tolist()
    assert len(set(expected)) > 2  # a text of one or two tokens would prove little
    for strategy in (lsjax.Autoregressive(), lsjax.SelfSpeculative(exit_layer=1, num_speculations=3)):
        assert lsjax.generate(ours, prompt.tolist(), 40, strategy).tokens[0] == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_we_write_transformers_loads_silently(variant, tmp_path, caplog):
    make_llama(tmp_path / "theirs", variant)
    convert(tmp_path / "theirs", tmp_path / "ours", "huggingface")
    logger = logging.getLogger("transformers")
    logger.propagate = True
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "transformers"):
        warnings.simplefilter("error")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert not [record.message for record in caplog.records]
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert model.dtype == original.dtype
    np.testing.assert_array_equal(run_llama(model, TOKENS)[0], run_llama(original, TOKENS)[0])
    # Our tokenizer opens a text with <s> if and only if the one of transformers does.
    text = "def f(x): return x\n"
    assert lsjax.load(tmp_path / "ours").tokenizer.encode(text) == tokenizer(text)["input_ids"]
    for name in ("num_hidden_layers", "head_dim", "tie_word_embeddings", "rms_norm_eps", "max_position_embeddings"):
        assert getattr(model.config, name) == getattr(original.config, name), name
    assert model.config.rope_parameters == original.config.rope_parameters


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_there_and_back_keeps_every_bit(dtype, tmp_path):
    model = make_llama(tmp_path / "a", "layerskip_llama2_7b").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "a", max_shard_size="100KB")
    convert(tmp_path / "a", tmp_path / "b", "lsjax")
    convert(tmp_path / "b", tmp_path / "c", "huggingface")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    assert again.dtype == model.dtype
    theirs, ours = model.state_dict(), again.state_dict()
    assert set(theirs) == set(ours)
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name]), name


def test_assistant_early_exit_works_on_what_we_write(tmp_path):
    make_llama(tmp_path / "theirs", "layerskip_llama32_1b")
    convert(tmp_path / "theirs", tmp_path / "ours", "huggingface")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    prompt = torch.as_tensor(TOKENS[:1, :20])
    plain = model.generate(prompt, max_new_tokens=20, do_sample=False)
    early = model.generate(prompt, max_new_tokens=20, do_sample=False, assistant_early_exit=4)
    assert plain.tolist() == early.tolist()


def test_a_trained_model_goes_to_transformers(tiny_run, tmp_path):
    result = lsjax.train(tiny_run, tmp_path / "run", verbose=False)
    convert(tmp_path / "run", tmp_path / "out", "huggingface")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    tokens = np.array([tokenizer("import os\n")["input_ids"]])
    params = jax.device_get(result.params)
    assert_close(np.asarray(lsjax.forward(params, tokens, tiny_run.model)), run_llama(model, tokens)[0])
