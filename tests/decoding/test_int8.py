"""Int8 drafts change no token of the full model; a model in int8 decodes as its own logits say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsjax
from lsjax.benchmarks.bandwidth import bytes_per_round
from lsjax.benchmarks.decoding import benchmark
from lsjax.decoding.batch import GenerationConfig, PromptBatch
from lsjax.decoding.forward import DRAFT
from lsjax.decoding.loops import self_speculative_loop
from lsjax.decoding.lowering import DecodeShape, _first_token
from lsjax.decoding.model import Model, quantize
from lsjax.decoding.program import DecodeProgram
from lsjax.decoding.sampling import Greedy
from lsjax.decoding.strategies import Autoregressive, EarlyExit, Sampling, SelfSpeculative
from lsjax.errors import UserError
from lsjax.model.quantization import Quantized, QuantizedLeft, is_quantized, states_in_int8
from lsjax.tuning import cost_model, decoded_batch
from tests.helpers.prompts import NEW, PROMPTS, NoTokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(varied, varied_params):
    return Model(varied, varied_params, NoTokenizer())


@pytest.fixture(scope="module")
def expected(model):
    return lsjax.generate(model, PROMPTS, NEW).tokens


@pytest.fixture(scope="module")
def misled(model):
    """Returns a model whose int8 drafter is far off: each weight has the values of another one's channels."""

    def wrong(a):
        return a._replace(values=jnp.roll(a.values, 3, axis=0)) if is_quantized(a) else a

    misled = dataclasses.replace(model)
    for exit_layer in (1, 2, 3, 4):
        weights = jax.tree.map(wrong, model.draft_weights(exit_layer)["layers"], is_leaf=is_quantized)
        misled._int8_drafters[exit_layer] = {"layers": weights, "lm_head": model.draft_weights(exit_layer)["lm_head"]}
    return misled


@pytest.mark.parametrize("exit_layer", [1, 3, 4])
@pytest.mark.parametrize("drafts", [1, 4])
def test_int8_drafts_leave_every_token_as_it_was(model, misled, expected, exit_layer, drafts):
    strategy = SelfSpeculative(exit_layer, drafts, "int8")
    assert lsjax.generate(model, PROMPTS, NEW, strategy).tokens == expected
    assert lsjax.generate(misled, PROMPTS, NEW, strategy).tokens == expected


def test_int8_drafts_go_with_copies(model, misled, expected):
    """Rounds of drafts, rounds of copies, and rounds of both occur in one batch."""
    strategy = SelfSpeculative(2, 3, "int8", lookup=5)
    result = lsjax.generate(misled, PROMPTS, NEW, strategy)
    assert result.tokens == lsjax.generate(model, PROMPTS, NEW, strategy).tokens == expected
    assert any(row["drafted_by_position"][4] for row in result.stats)  # only copies are as many


def test_int8_drafts_of_all_layers_are_nearly_always_accepted(model, misled):
    """The int8 weights do draft: right ones agree, wrong ones do not."""
    strategy = SelfSpeculative(4, 3, "int8")

    def rate(m):
        return np.mean([s["acceptance_rate"] for s in lsjax.generate(m, PROMPTS, NEW, strategy).stats])

    assert rate(model) > 0.9
    assert rate(misled) < 0.6


def test_the_cache_holds_what_the_full_model_writes(model, misled):
    """After a round, the entries of every layer are those of a run without drafts; none is left by an int8 draft."""
    config, shape = (
        model.config,
        DecodeShape(batch_size=3, padded_prompt_length=16, capacity=64, buffer_size=40, num_stop_tokens=0),
    )
    batch = PromptBatch.make(model, PROMPTS, GenerationConfig(NEW))
    strategy = SelfSpeculative(3, 4, "int8")

    def begun(strategy):
        return _first_token(
            model.decoder_weights(),
            batch.tokens,
            batch.lengths,
            20,
            batch.stop_token_ids,
            Greedy(),
            config=config,
            strategy=strategy,
            shape=shape,
        )

    state = begun(strategy)
    weights = model.decoder_weights() | {DRAFT: misled.draft_weights(3)}
    after = self_speculative_loop(weights, state, jnp.int32(20), jnp.asarray(batch.stop_token_ids), config, 3, 4)
    own = self_speculative_loop(
        model.decoder_weights(), state, jnp.int32(20), jnp.asarray(batch.stop_token_ids), config, 4, 4
    )
    for ours, theirs in zip(jax.tree.leaves(after.cache), jax.tree.leaves(own.cache), strict=True):
        for row, length in enumerate(np.minimum(after.length, own.length)):
            np.testing.assert_allclose(ours[row, :, :length], theirs[row, :, :length], atol=1e-5)


def test_sampled_int8_drafts_are_kept_by_what_both_distributions_share(model):
    """The distributions are nearly equal, so nearly all drafts of all layers are kept, and the texts are valid
    samples.
    """
    strategy, cold = SelfSpeculative(4, 3, "int8"), Sampling(temperature=1e-3)
    stats = lsjax.generate(model, PROMPTS, NEW, strategy, Sampling(0.8), seed=3).stats
    assert np.mean([row["acceptance_rate"] for row in stats]) > 0.8
    assert lsjax.generate(model, PROMPTS, NEW, strategy, cold).tokens == lsjax.generate(model, PROMPTS, NEW).tokens


def test_a_model_in_int8_decodes_by_its_own_logits(model):
    int8 = quantize(model)
    assert quantize(int8) is int8
    params = states_in_int8(int8.params, rounded=True)  # as decoding on a single CPU does
    for prompt, new in zip(PROMPTS, lsjax.generate(int8, PROMPTS, NEW).tokens, strict=True):
        logits = np.asarray(lsjax.forward(params, [[*prompt, *new]], int8.config)[0])
        chosen = logits[len(prompt) - 1 : -1].argmax(-1)
        assert chosen.tolist() == new


def test_on_a_single_cpu_all_int8_weights_multiply_integers(model):
    """Parameters that are trained, stored or measured keep the form that does not round states."""
    int8 = quantize(model)
    for decoding in (int8.decoder_weights(), model.draft_weights(3)):
        assert forms(decoding) == {QuantizedLeft}
    for stored in (int8.params, int8.stack_params()):
        assert forms(stored) == {Quantized}


def forms(weights):
    """Returns the forms of the int8 weights of a tree."""
    return {type(leaf) for leaf in jax.tree.leaves(weights, is_leaf=is_quantized) if is_quantized(leaf)}


def test_self_speculation_in_int8_equals_autoregressive_in_int8(model):
    int8 = quantize(model)
    assert lsjax.generate(int8, PROMPTS, NEW, SelfSpeculative(2, 3)).tokens == lsjax.generate(int8, PROMPTS, NEW).tokens


def test_a_prediction_for_an_int8_model_is_of_its_own_exits(model):
    int8 = quantize(model)
    plain = lsjax.generate(int8, PROMPTS, NEW).tokens
    params = decoded_batch.params_as_decoded(int8)
    text = decoded_batch.read_decoded(int8, params, PromptBatch.make(int8, PROMPTS, GenerationConfig(NEW)), plain)
    rounds = cost_model.expected_rounds(text.acceptance, text.tokens, 3)[1]
    stats = lsjax.generate(int8, PROMPTS, NEW, SelfSpeculative(2, 3)).stats
    assert rounds.tolist() == [row["rounds"] for row in stats]


def test_bytes_of_a_round_by_hand(model):
    """A round reads E int8 layers and the int8 head d times, and all layers and the head once, each with its caches."""
    c, rows, capacity, early, drafts = model.config, 3, 40, 3, 2
    layer = c.width * (c.num_heads + 2 * c.num_kv_heads) * c.head_width + c.num_heads * c.head_width * c.width
    layer += 3 * c.width * c.feed_forward_width
    scales = (c.num_heads + 2 * c.num_kv_heads) * c.head_width + 2 * c.width + 2 * c.feed_forward_width
    head, norm, cache = c.width * c.vocab_size, 4 * c.width, rows * capacity * 2 * c.num_kv_heads * c.head_width * 4
    int8 = early * (layer + 4 * scales + 2 * norm + cache) + head + 4 * c.vocab_size + norm
    full = c.num_layers * (4 * layer + 2 * norm + cache) + 4 * head + norm
    strategy = SelfSpeculative(early, drafts, "int8")
    weights = DecodeProgram(c, strategy, PromptBatch.make(model, PROMPTS, GenerationConfig(NEW))).weights(model)
    assert bytes_per_round(weights, c, strategy, rows, capacity) == drafts * int8 + full
    own = early * (4 * layer + 2 * norm + cache) + 4 * head + norm
    weights = model.decoder_weights()
    assert bytes_per_round(weights, c, SelfSpeculative(early, drafts), rows, capacity) == drafts * own + full
    assert bytes_per_round(weights, c, EarlyExit(early), rows, capacity) == own
    int8_model = quantize(model).decoder_weights()
    assert bytes_per_round(int8_model, c, EarlyExit(early), rows, capacity) == int8


def test_the_report_names_the_weights(model):
    notes = []
    how = {"max_new_tokens": 8, "repeats": 1, "note": notes.append}
    report = benchmark(model, PROMPTS[:1], [SelfSpeculative(2, 3), SelfSpeculative(2, 3, "int8")], **how)
    assert report["weights"] == "float32"
    assert [run["draft_weights"] for run in report["runs"]] == [None, None, "int8"]
    assert [run["matches_autoregressive"] for run in report["runs"]] == [True] * 3
    assert report["runs"][2]["bytes_per_round"] < report["runs"][1]["bytes_per_round"]
    assert benchmark(quantize(model), PROMPTS[:1], [], **how)["weights"] == "int8"


@pytest.mark.parametrize(
    ("in_int8", "strategy", "message"),
    [
        (False, SelfSpeculative(2, 3, "int4"), "draft_weights must be \"int8\", or None .* got 'int4'"),
        (True, SelfSpeculative(2, 3, "int8"), "this model is in int8 already"),
    ],
)
def test_bad_settings_are_named(model, in_int8, strategy, message):
    with pytest.raises(UserError, match=message):
        lsjax.generate(quantize(model) if in_int8 else model, PROMPTS, 4, strategy)


@pytest.mark.parametrize("strategy", [Autoregressive(), SelfSpeculative(2, 3, "int8")], ids=lambda s: s.name)
def test_split_over_devices_it_gives_the_tokens_of_one(model, strategy):
    from lsjax.config import MeshConfig
    from lsjax.parallel.sharding import make_mesh, tree_shardings

    shardings = tree_shardings(model.params, make_mesh(MeshConfig(1, 1, 2), jax.devices()[:2]))
    split = dataclasses.replace(model, params=jax.device_put(model.params, shardings))
    one = model
    if isinstance(strategy, Autoregressive):
        one, split = quantize(one), quantize(split)
        # Split weights do not round states, so those of one device must not either.
        one._laid_out = states_in_int8(one.decoder_weights(), rounded=False)
        values = split.decoder_weights()["layers"][0]["attention"]["qkv"].values
        assert values.addressable_shards[0].data.size == values.size // 2
    assert lsjax.generate(split, PROMPTS, NEW, strategy).tokens == lsjax.generate(one, PROMPTS, NEW, strategy).tokens
