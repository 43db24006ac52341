"""Predictions of every layer: against a Llama in float64 numpy, with bounded memory, for models in every form."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsjax
from lsjax.config import ModelConfig
from lsjax.data.tokenizer import train_tokenizer
from lsjax.decoding.forward import decoder_weights
from lsjax.decoding.model import Model
from lsjax.errors import UserError
from lsjax.evaluation.layers import predict_layers, settling_layers
from lsjax.model.transformer import init_params
from tests.helpers import numpy_llama

MODEL = Path(__file__).parent.parent / "io" / "recorded" / "llama32"
TEXT = "def main(): return 0"


@pytest.fixture(scope="module")
def model(varied, varied_params):
    return Model(varied, varied_params, train_tokenizer([TEXT], 300))


def test_tokens_and_probabilities_equal_numpy(model):
    """Here norm, head and softmax of every layer are computed in float64 by code that shares nothing with lsjax."""
    text = np.random.default_rng(0).integers(0, 320, 11).tolist()
    found = lsjax.layer_predictions(model, text)
    states = numpy_llama.hidden_states(model.params, np.array(text), model.config)
    logits = numpy_llama.logits(model.params, states, model.config)
    probabilities = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities /= probabilities.sum(axis=-1, keepdims=True)
    assert found.tokens.shape == found.probabilities.shape == (4, 11)
    assert found.probabilities.dtype == np.float32
    assert found.tokens.tolist() == logits.argmax(axis=-1).tolist()
    np.testing.assert_allclose(found.probabilities, probabilities.max(axis=-1), rtol=1e-4)
    assert len(np.unique(found.tokens)) > 10  # a model that repeats one token would pass more easily


@pytest.mark.parametrize("layers", [1, 2, 7])
def test_a_prediction_settles_where_all_later_layers_agree(layers):
    predicted = np.random.default_rng(layers).integers(0, 2, (layers, 200))
    expected = []
    for column in predicted.T:
        first = layers
        while first > 1 and column[first - 2] == column[-1]:
            first -= 1
        expected.append(first)
    assert settling_layers(predicted).tolist() == expected


def test_chunks_and_padding_do_not_change_the_result(model):
    weights = model.decoder_weights()
    text = np.random.default_rng(1).integers(0, 320, 64)
    tokens, probabilities = predict_layers(weights, text, model.config)
    for chunk in (1, 16, 48):
        parts = predict_layers(weights, text, model.config, chunk=chunk)
        assert parts[0].tolist() == tokens.tolist()
        np.testing.assert_allclose(parts[1], probabilities, rtol=1e-5)
    longer = predict_layers(weights, np.append(text, np.zeros(64, int)), model.config)
    assert longer[0][:, :64].tolist() == tokens.tolist()
    np.testing.assert_allclose(longer[1][:, :64], probabilities, rtol=1e-5)


def test_a_text_and_its_ids_are_the_same_prompt(model):
    ids = model.tokenizer.encode(TEXT)
    assert ids[0] == model.tokenizer.begin
    text, tokens = lsjax.layer_predictions(model, TEXT), lsjax.layer_predictions(model, np.array(ids))
    assert text.text_tokens.tolist() == tokens.text_tokens.tolist() == ids
    assert text.prompt_length == len(ids)
    assert text.tokens.tolist() == tokens.tokens.tolist()


def test_the_continuation_is_that_of_generate(model):
    (new,) = lsjax.generate(model, TEXT, 9).tokens
    found = lsjax.layer_predictions(model, TEXT, max_new_tokens=9)
    prompt = found.prompt_length
    assert found.text_tokens[prompt:].tolist() == new
    assert found.tokens[-1, prompt - 1 : -1].tolist() == new
    assert len(set(new)) > 3
    alone = lsjax.layer_predictions(model, TEXT)
    assert alone.tokens.tolist() == found.tokens[:, :prompt].tolist()


def test_lengths_of_one_bucket_share_a_program(model):
    lsjax.layer_predictions(model, [1] * 17)
    before = predict_layers._cache_size()
    lsjax.layer_predictions(model, [2] * 32)
    lsjax.layer_predictions(model, [3] * 25)
    assert predict_layers._cache_size() == before
    lsjax.layer_predictions(model, [3] * 33)
    assert predict_layers._cache_size() == before + 1


def test_no_array_holds_the_logits_of_a_whole_text():
    length, vocabulary = 2048, 4096
    config = ModelConfig(
        num_layers=3,
        width=16,
        num_heads=1,
        num_kv_heads=1,
        head_width=16,
        feed_forward_width=16,
        vocab_size=vocabulary,
        context_length=length,
    )

    def make():
        return decoder_weights(init_params(jax.random.key(0), config), jnp.float32, for_cpu=True)

    text = jax.ShapeDtypeStruct((length,), jnp.int32)
    program = predict_layers.lower(jax.eval_shape(make), text, config).compile()
    shapes = re.findall(r"(?:f32|f64|bf16|s32|u32|pred)\[([\d,]+)\]", program.as_text())
    sizes = [np.prod([int(size) for size in shape.split(",")]) for shape in shapes]
    assert max(sizes) >= 128 * vocabulary  # the logits of one chunk are there, so arrays were found
    assert max(sizes) < length * vocabulary
    # Attention holds the scores of 1024 queries; logits would be 4 * length * vocabulary bytes, for each layer.
    assert program.memory_analysis().temp_size_in_bytes < 4 * length * vocabulary


@pytest.mark.parametrize("form", [{"for_decoding": True}, {"tensor": 2}, {"tensor": 2, "for_decoding": True}])
def test_a_model_in_any_form_predicts_the_same(form):
    plain = lsjax.layer_predictions(lsjax.load(MODEL), "the cat", 5)
    other = lsjax.layer_predictions(lsjax.load(MODEL, **form), "the cat", 5)
    assert other.text_tokens.tolist() == plain.text_tokens.tolist()
    assert other.tokens.tolist() == plain.tokens.tolist()
    np.testing.assert_allclose(other.probabilities, plain.probabilities, rtol=1e-4)


@pytest.mark.parametrize("form", [{"weights": "int8"}, {"weights": "int8", "for_decoding": True}, {"cache": "int8"}])
def test_a_rounded_model_shows_its_own_predictions(form):
    plain = lsjax.layer_predictions(lsjax.load(MODEL), "the cat", 12)
    rounded = lsjax.layer_predictions(lsjax.load(MODEL, **form), "the cat", 12)
    assert rounded.tokens[-1, rounded.prompt_length - 1 : -1].tolist() == rounded.continuation.tolist()
    prompt = np.s_[:, : plain.prompt_length]
    assert np.abs(rounded.probabilities[prompt] - plain.probabilities[prompt]).max() > 1e-5


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [
        ([], 0, "prompt 0 is empty"),
        ([1, 320], 0, "token 320, outside the vocabulary 0..319"),
        ([1] * 129, 0, "exceeds the model's context of 128"),
        ([1] * 125, 4, "exceeds the model's context of 128"),
        (["a", "b"], 0, "prompt 0 must be a text or a list of token ids"),
        ("a", -1, "max_new_tokens must be at least 0, got -1"),
        ("a", 1.5, "max_new_tokens must be a whole number, got 1.5"),
        ("a", True, "max_new_tokens must be a whole number, got True"),
    ],
)
def test_bad_input_is_named(model, prompt, new, message):
    with pytest.raises(UserError, match=message):
        lsjax.layer_predictions(model, prompt, new)


def test_the_longest_text_that_fits_is_read(model):
    assert lsjax.layer_predictions(model, [1] * 128).tokens.shape == (4, 128)
