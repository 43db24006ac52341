"""Decoding with an int8 KV cache equals the model over rounded keys and values, however a text is decoded."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsjax
from lsjax.benchmarks.bandwidth import bytes_per_round
from lsjax.benchmarks.decoding import benchmark
from lsjax.data.tokenizer import train_tokenizer
from lsjax.decoding import forward
from lsjax.decoding.batch import GenerationConfig, PromptBatch
from lsjax.decoding.forward import decoder_weights, init_cache, prefill, run_layers
from lsjax.decoding.lowering import DecodeShape, lower_decoding
from lsjax.decoding.model import Model
from lsjax.decoding.program import DecodeProgram
from lsjax.decoding.program_cache import PROGRAM_CACHE
from lsjax.decoding.strategies import EarlyExit, Sampling, SelfSpeculative
from lsjax.errors import UserError
from lsjax.io.huggingface import write_huggingface
from lsjax.model.transformer import exit_logits
from lsjax.reports.tables import decoding_table
from lsjax.tuning import cost_model, decoded_batch
from tests.conftest import random_params
from tests.helpers import numpy_llama
from tests.helpers.prompts import NEW, PROMPTS, NoTokenizer

pytestmark = pytest.mark.slow

TEXT = np.random.default_rng(0).integers(1, 320, 13).astype(np.int32)


@pytest.fixture(scope="module")
def model(varied, varied_params):
    """Returns a model of three layers: compiling is what these tests spend their time on."""
    layers = jax.tree.map(lambda a: a[:3], varied_params["layers"])
    config = dataclasses.replace(varied, num_layers=3)
    return Model(config, varied_params | {"layers": layers}, NoTokenizer(), cache="int8")


@pytest.fixture(scope="module")
def plain(model):
    return lsjax.generate(model, PROMPTS, NEW).tokens


def rounded(entries):
    """Returns keys or values [S, H] as int8 with one scale per entry represents them."""
    scale = np.abs(entries).max(-1, keepdims=True) / 127
    return np.round(entries / scale) * scale


@pytest.fixture(scope="module")
def attentive(varied):
    """Returns (params, config) of three layers that outweigh the embedding, so that rounding matters."""
    config = dataclasses.replace(varied, num_layers=3)
    params = random_params(config)
    return params | {"embed": 0.05 * params["embed"]}, config


@pytest.fixture(scope="module")
def in_numpy(attentive):
    """Returns the logits [V] after the text, over rounded entries and over exact ones."""
    params, config = jax.device_get(attentive[0]), attentive[1]
    states = [numpy_llama.hidden_states(params, TEXT, config, held=held)[-1, -1] for held in (rounded, lambda a: a)]
    return [numpy_llama.logits(params, state, config) for state in states]


def read(params, config, parts):
    """Returns the logits [V] after the text, its first part read by prefill and the rest by passes against the
    cache.
    """
    weights, whole = decoder_weights(params, jnp.float32), range(config.num_layers)
    start, *later = parts
    cache = init_cache(config, 1, 64, jnp.int8)
    begin = jax.jit(functools.partial(prefill, config=config, layers=whole))
    logits, cache = begin(weights, TEXT[None, :start], np.array([start]), cache)
    go_on = jax.jit(functools.partial(run_layers, layers=whole, config=config))
    for tokens in later:
        x = forward.embed(weights, jnp.asarray(TEXT[None, start : start + tokens]))
        x, cache = go_on(weights, x, cache, jnp.array([start]))
        logits, start = exit_logits(weights, x, config)[:, -1], start + tokens
    assert start == len(TEXT)
    return logits[0], cache


@pytest.mark.parametrize("parts", [(13,), (9, 1, 1, 1, 1), (1, 4, 4, 4)], ids=str)
def test_however_a_text_is_read_its_logits_are_those_over_rounded_entries(attentive, in_numpy, parts):
    """The numpy model is the oracle. It computes in float64, so a number at the edge may be rounded to the other
    side.
    """
    logits, cache = read(*attentive, parts)
    over_rounded, over_exact = in_numpy
    far = np.abs(over_exact - over_rounded).max()
    assert far > 0.02 * over_exact.std()
    assert np.abs(logits - over_rounded).max() < 0.2 * far
    assert {leaf.dtype.name for leaf in jax.tree.leaves(cache)} == {"int8", "float32"}


@pytest.mark.parametrize(
    "strategy",
    [
        SelfSpeculative(1, 4),
        SelfSpeculative(3, 2),
        SelfSpeculative(2, 3, "int8"),
        SelfSpeculative(2, 3, lookup=5),
    ],
    ids=str,
)
def test_self_speculation_gives_autoregressive_tokens(model, plain, strategy):
    found = lsjax.generate(model, PROMPTS, NEW, strategy)
    assert found.tokens == plain
    assert all(row["accepted"] for row in found.stats)


def test_rows_that_wait_and_pieces_of_a_stream_are_the_same(model):
    model = dataclasses.replace(model, tokenizer=train_tokenizer(["some text"], 300))
    strategy, how = SelfSpeculative(2, 3), {"sampling": Sampling(0.8), "seed": 3}
    alone = lsjax.generate(model, PROMPTS, NEW, strategy, **how).tokens
    assert lsjax.generate(model, PROMPTS, NEW, strategy, batch_size=2, **how).tokens == alone
    pieces = list(lsjax.stream(model, PROMPTS, NEW, strategy, **how))
    assert [[t for piece in pieces if piece.row == row for t in piece.tokens] for row in range(3)] == alone


def test_prompts_in_chunks(monkeypatch, model, plain):
    monkeypatch.setattr(forward, "PREFILL_CHUNK", 8)
    PROGRAM_CACHE.clear()
    assert lsjax.generate(model, PROMPTS, NEW).tokens == plain
    PROGRAM_CACHE.clear()


def test_split_over_devices(model, tmp_path):
    write_huggingface(tmp_path, model.config, jax.device_get(model.params), train_tokenizer(["some text"], 300))
    alone, split = (lsjax.load(tmp_path, tensor=devices, cache="int8") for devices in (1, 2))
    tokens = [lsjax.generate(model, PROMPTS, NEW, SelfSpeculative(2, 3)).tokens for model in (alone, split)]
    assert tokens[0] == tokens[1]
    weights = split.decoder_weights()
    layout = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), weights)
    shape = DecodeShape(
        batch_size=2, padded_prompt_length=16, capacity=64, buffer_size=32, num_stop_tokens=1, cache="int8"
    )
    _, loop = lower_decoding(layout, model.config, SelfSpeculative(2, 3), shape)
    caches = loop.compile().output_shardings.cache
    for layer in caches:
        for values, scale in layer:
            assert values.shard_shape((2, 2, 64, 8)) == (2, 1, 64, 8)
            assert scale.shard_shape((2, 2, 64)) == (2, 1, 64)


def test_a_prediction_is_of_rounded_entries(model, plain):
    batch = PromptBatch.make(model, PROMPTS, GenerationConfig(NEW))
    text = decoded_batch.read_decoded(model, model.params, batch, plain)
    rounds = cost_model.expected_rounds(text.acceptance, text.tokens, 3)[1]
    stats = lsjax.generate(model, PROMPTS, NEW, SelfSpeculative(2, 3)).stats
    assert rounds.tolist() == [row["rounds"] for row in stats]
    sampled = PromptBatch.make(model, PROMPTS, GenerationConfig(NEW, Sampling(1.0)))
    exact = dataclasses.replace(model, cache="auto")
    chances = [decoded_batch.read_decoded(m, m.params, sampled, plain).acceptance for m in (model, exact, model)]
    assert (chances[0] != chances[1]).any()
    assert (chances[0] == chances[2]).all()


def test_bytes_of_a_round_by_hand(model):
    """40 entries of 3 sequences, 2 KV heads and both sides hold 8 numbers and a scale each."""
    how = model.decoder_weights(), model.config, EarlyExit(2), 3, 40
    assert bytes_per_round(*how, cache="auto") - bytes_per_round(*how, cache="int8") == 2 * 3 * 40 * 2 * 2 * (
        4 * 8 - 12
    )


def test_the_report_names_it(model):
    notes = []
    how = {"max_new_tokens": 8, "repeats": 1, "note": notes.append}
    report = benchmark(model, PROMPTS[:1], [SelfSpeculative(2, 3)], **how)
    assert (report["weights"], report["cache"]) == ("float32", "int8")
    assert [run["matches_autoregressive"] for run in report["runs"]] == [True] * 2
    assert decoding_table(report).title.endswith("weights in float32, KV cache in int8")
    assert sum("int8 KV cache" in note for note in notes) == 1
    assert decoding_table(report | {"cache": "float32"}).title.endswith("weights in float32")
    entries = DecodeProgram(
        model.config, EarlyExit(3), PromptBatch.make(model, PROMPTS[:1], GenerationConfig(8))
    ).capacity
    by_hand = bytes_per_round(model.decoder_weights(), model.config, EarlyExit(3), 1, entries, "int8")
    assert report["runs"][0]["bytes_per_round"] == by_hand


def test_the_state_holds_int8_and_scales_once(model):
    """3 sequences, 2 KV heads, both sides and 3 layers hold 8 numbers and a scale per entry, and all of it is
    donated.
    """
    program = DecodeProgram(
        model.config, SelfSpeculative(2, 3), PromptBatch.make(model, PROMPTS, GenerationConfig(NEW))
    )

    def aliased(cache):
        program.compile(model.decoder_weights(), cache=cache)
        return program._programs.decode.memory_analysis().alias_size_in_bytes

    assert aliased("auto") - aliased("int8") == 3 * 2 * 2 * 3 * program.capacity * (4 * 8 - 12)


def test_an_unknown_cache_is_named(tmp_path):
    with pytest.raises(UserError, match="cache is 'int4'; it must be one of auto, int8"):
        lsjax.load(tmp_path, cache="int4")
