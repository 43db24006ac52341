"""An exit's adapter changes drafts and early exits at its exit, and nothing else; and it is a file beside a model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import lsjax
from lsjax.data.tokenizer import train_tokenizer
from lsjax.decoding.batch import GenerationConfig, PromptBatch
from lsjax.decoding.forward import DRAFT, EXIT_ADAPTER
from lsjax.decoding.model import Model, quantize
from lsjax.decoding.program import DecodeProgram
from lsjax.decoding.sampling import Greedy
from lsjax.decoding.strategies import Sampling, SelfSpeculative
from lsjax.evaluation.exits import exit_profile
from lsjax.evaluation.likelihood import continuation_likelihoods
from lsjax.io.convert import convert
from lsjax.io.exit_adapter import FILE, write_exit_adapter
from lsjax.io.huggingface import write_huggingface
from lsjax.model.exit_adapter import ExitAdapter
from lsjax.model.transformer import exit_logits, hidden_states
from lsjax.tuning.acceptance import draft_acceptance
from tests.helpers.batches import weighted_batch
from tests.helpers.prompts import NEW, PROMPTS, NoTokenizer

EXIT = 2


@pytest.fixture(scope="module")
def plain(varied, varied_params):
    return Model(varied, varied_params, NoTokenizer())


@pytest.fixture(scope="module")
def adapter(varied):
    kernel = np.random.default_rng(1).normal(0, 0.2, (varied.width, varied.width))
    return ExitAdapter(EXIT, jnp.asarray(kernel, jnp.float32))


@pytest.fixture(scope="module")
def adapted(plain, adapter):
    return dataclasses.replace(plain, exit_adapter=adapter)


@pytest.fixture(scope="module")
def expected(plain):
    return lsjax.generate(plain, PROMPTS, NEW).tokens


def accepted(result):
    return [(stats["drafted"], stats["accepted"]) for stats in result.stats]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8)], ids=["greedy", "sampled"])
def test_an_adapter_of_zeros_changes_nothing(plain, adapter, sampling):
    zeros = dataclasses.replace(plain, exit_adapter=ExitAdapter(EXIT, 0 * adapter.kernel))
    for strategy in (SelfSpeculative(EXIT, 3), lsjax.EarlyExit(EXIT)):
        ours, theirs = (lsjax.generate(model, PROMPTS, NEW, strategy, sampling, seed=3) for model in (zeros, plain))
        assert ours.tokens == theirs.tokens
        assert strategy.name == "early_exit" or accepted(ours) == accepted(theirs)


@pytest.mark.parametrize(
    "settings",
    [{}, {"draft_vocabulary": range(0, 320, 2)}, {"draft_weights": "int8"}, {"lookup": 4}],
    ids=lambda settings: "".join(settings) or "alone",
)
def test_greedy_tokens_are_the_models_own_whatever_the_adapter_drafts(plain, adapted, expected, settings):
    strategy = SelfSpeculative(EXIT, 3, **settings)
    ours, theirs = (lsjax.generate(model, PROMPTS, NEW, strategy) for model in (adapted, plain))
    assert ours.tokens == theirs.tokens == expected
    assert accepted(ours) != accepted(theirs)
    assert lsjax.generate(adapted, PROMPTS, NEW).tokens == expected


def test_layer_predictions_of_the_exit_go_through_its_adapter(plain, adapted, adapter):
    """Compares with the formula in numpy, and with the text of an early exit."""
    text = np.random.default_rng(3).integers(0, 320, 11).tolist()
    ours, theirs = (lsjax.layer_predictions(model, text) for model in (adapted, plain))
    states = np.asarray(hidden_states(plain.params, jnp.array([text]), plain.config))[EXIT - 1, 0]
    logits = exit_logits(plain.params, jnp.asarray(states + states @ np.asarray(adapter.kernel)), plain.config)
    assert ours.tokens[EXIT - 1].tolist() == np.argmax(logits, axis=-1).tolist() != theirs.tokens[EXIT - 1].tolist()
    others = [layer for layer in range(plain.config.num_layers) if layer != EXIT - 1]
    assert ours.tokens[others].tolist() == theirs.tokens[others].tolist()
    (first,) = lsjax.generate(adapted, [text], 1, lsjax.EarlyExit(EXIT)).tokens
    assert ours.tokens[EXIT - 1, -1] == first[0]


def test_in_int8_greedy_tokens_are_those_of_the_int8_model(adapted):
    rounded = quantize(adapted)
    assert rounded.exit_adapter is adapted.exit_adapter
    ours = lsjax.generate(rounded, PROMPTS, NEW, SelfSpeculative(EXIT, 3))
    assert ours.tokens == lsjax.generate(rounded, PROMPTS, NEW).tokens


def test_another_exit_drafts_without_it(plain, adapted):
    ours, theirs = (lsjax.generate(model, PROMPTS, NEW, SelfSpeculative(1, 3)) for model in (adapted, plain))
    assert accepted(ours) == accepted(theirs)


def test_only_weights_that_draft_hold_it(adapted):
    batch = PromptBatch.make(adapted, PROMPTS, GenerationConfig(NEW))
    holds = {}
    for strategy in (lsjax.Autoregressive(), SelfSpeculative(EXIT, 1), SelfSpeculative(1, 1), lsjax.EarlyExit(EXIT)):
        weights = DecodeProgram(adapted.config, strategy, batch).weights(adapted)
        holds[strategy] = EXIT_ADAPTER in weights, EXIT_ADAPTER in weights.get(DRAFT, {})
    assert list(holds.values()) == [(False, False), (False, True), (False, False), (True, False)]


def adapted_logits(model, tokens):
    """Returns the logits [B,S,V] of the adapted exit, from the public states and the formula."""
    h = hidden_states(model.params, jnp.asarray(tokens), model.config)[EXIT - 1]
    return exit_logits(model.params, h + h @ model.exit_adapter.kernel, model.config)


def test_an_early_exit_decodes_with_it(adapted):
    for prompt, new in zip(PROMPTS, lsjax.generate(adapted, PROMPTS, NEW, lsjax.EarlyExit(EXIT)).tokens, strict=True):
        text = [*prompt, *new]
        assert np.argmax(adapted_logits(adapted, [text])[0], -1)[len(prompt) - 1 : -1].tolist() == new


def test_predicted_acceptance_is_that_of_its_drafts(adapted, plain, expected):
    text = np.array([PROMPTS[1] + expected[1]], np.int32)
    every = np.ones((1, adapted.config.vocab_size), bool)
    ours, theirs = (
        draft_acceptance(
            adapted.params, text, np.array([17]), Greedy(), adapted.config, NEW, jnp.float32, every, exit_adapter=a
        ).chance[0, :, 0]
        for a in (adapted.exit_adapter, None)
    )
    right = np.asarray(adapted_logits(adapted, text)[0]).argmax(-1)[16:-1] == expected[1]
    np.testing.assert_array_equal(ours[EXIT - 1], right)
    assert np.any(ours[EXIT - 1] != theirs[EXIT - 1])
    np.testing.assert_array_equal(np.delete(ours, EXIT - 1, 0), np.delete(theirs, EXIT - 1, 0))


def test_an_evaluation_shows_the_adapted_exit(adapted, varied):
    batch = weighted_batch()
    ours = exit_profile(adapted.params, [batch], varied, stride=4, exit_adapter=adapted.exit_adapter)
    plain = exit_profile(adapted.params, [batch], varied)
    assert ours.exit_layers.tolist() == [EXIT, 4]
    assert ours.at(4) == pytest.approx(plain.at(4))
    log_p = jax.nn.log_softmax(adapted_logits(adapted, batch.tokens))
    of_token = np.take_along_axis(np.asarray(log_p), batch.targets[..., None], -1)[..., 0]
    assert ours.at(EXIT)[0] == pytest.approx(-(of_token * batch.weights).sum() / batch.weights.sum(), rel=1e-4)
    assert abs(ours.at(EXIT)[0] - plain.at(EXIT)[0]) > 0.01
    pair = (batch.tokens[0].tolist(), [int(batch.targets[0, -1])])
    found = continuation_likelihoods(adapted.params, varied, [pair], exit_layer=EXIT, exit_adapter=adapted.exit_adapter)
    assert found[0].log_likelihood == pytest.approx(float(of_token[0, -1]), rel=1e-4)


@pytest.fixture(scope="module")
def folder(varied, varied_params, adapter, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_huggingface(path, varied, jax.device_get(varied_params), train_tokenizer(["some text to learn from"], 300))
    write_exit_adapter(path, adapter)
    return path


def test_conversions_keep_it(folder, adapter, tmp_path):
    convert(folder, tmp_path / "lsjax", "lsjax")
    convert(tmp_path / "lsjax", tmp_path / "back", "huggingface")
    for path in (folder, tmp_path / "lsjax", tmp_path / "back"):
        found = lsjax.load(path).exit_adapter
        assert found.exit_layer == EXIT
        np.testing.assert_array_equal(found.kernel, adapter.kernel)
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "back" / "model.safetensors").read_bytes()
    convert(folder, tmp_path / "half", "huggingface", "bfloat16")
    assert lsjax.load(tmp_path / "half", dtype="stored").exit_adapter.kernel.dtype == "bfloat16"
    assert "adapter of exit 2" in repr(lsjax.load(folder))


def test_a_model_loaded_for_decoding_drafts_with_it(folder, adapted):
    ours = lsjax.generate(lsjax.load(folder, for_decoding=True), PROMPTS, NEW, SelfSpeculative(EXIT, 3))
    theirs = lsjax.generate(adapted, PROMPTS, NEW, SelfSpeculative(EXIT, 3))
    assert ours.tokens == theirs.tokens
    assert accepted(ours) == accepted(theirs)


@pytest.mark.slow
def test_a_split_model_drafts_with_it(folder, adapted):
    split = lsjax.load(folder, tensor=2)
    for strategy in (SelfSpeculative(EXIT, 3), lsjax.EarlyExit(EXIT)):
        ours, theirs = (lsjax.generate(model, PROMPTS, NEW, strategy) for model in (split, adapted))
        assert ours.tokens == theirs.tokens
        assert strategy.name == "early_exit" or accepted(ours) == accepted(theirs)


def _tensors(names=("kernel",), shape=(32, 32), value=0.0, dtype=np.float32):
    return {name: np.full(shape, value, dtype) for name in names}


@pytest.mark.parametrize(
    ("tensors", "exit_layer", "said"),
    [
        (_tensors(("bias", "kernel")), "2", "an exit adapter is one tensor, kernel"),
        (_tensors(shape=(32, 16)), "2", r"needs numbers \[32, 32\]"),
        (_tensors(dtype=np.int32), "2", "kernel is int32"),
        (_tensors(value=np.nan), "2", "kernel holds NaN"),
        (_tensors(), "4", "of exit layer '4'; this model has early exits 1..3"),
        (_tensors(), '"two"', "of exit layer"),
        (None, "2", "damaged"),
    ],
    ids=["tensors", "shape", "dtype", "nan", "last", "word", "bytes"],
)
def test_a_wrong_file_is_refused_with_its_name(folder, adapter, tensors, exit_layer, said):
    path = folder / FILE
    try:
        if tensors is None:
            path.write_bytes(b"\0" * 20)
        else:
            save_file(tensors, path, metadata={"exit_layer": exit_layer})
        with pytest.raises(lsjax.UserError, match=said) as refused:
            lsjax.load(folder)
        assert FILE in str(refused.value)
    finally:
        write_exit_adapter(folder, adapter)
