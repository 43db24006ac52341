"""Drafts from a part of the vocabulary change no token and no distribution, and are those of the head's own rows."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsjax
from lsjax.benchmarks.bandwidth import bytes_per_round
from lsjax.benchmarks.decoding import benchmark
from lsjax.config import MeshConfig, ModelConfig
from lsjax.decoding.batch import GenerationConfig, PromptBatch
from lsjax.decoding.draft_vocabulary import draft_token_ids, trim_head
from lsjax.decoding.forward import DRAFT, TOKEN_IDS, init_cache, prefill
from lsjax.decoding.loops import begin, draft, self_speculative_loop
from lsjax.decoding.model import Model, quantize
from lsjax.decoding.program import DecodeProgram
from lsjax.decoding.program_cache import PROGRAM_CACHE
from lsjax.decoding.sampling import Coupled, Greedy, Sampled, Subset
from lsjax.decoding.strategies import Sampling, SelfSpeculative, label
from lsjax.errors import UserError
from lsjax.io.draft_vocabulary import RankedTokens, list_path, write_list
from lsjax.model.transformer import forward
from lsjax.parallel.sharding import make_mesh, tree_shardings
from tests.conftest import random_params
from tests.helpers.counted import count_flops
from tests.helpers.prompts import NoTokenizer

CONFIG = ModelConfig(3, 16, 2, 1, 8, 24, 40, 64, tie_embeddings=False)
PROMPTS = [[5, 9, 2], [7] * 13, [30, 1, 14, 15, 22, 6, 33]]
NEW = 24
STOP = 39
HALF = tuple(np.random.default_rng(0).permutation(39)[:19].tolist())  # and the stop token
ALL = tuple(range(40))


class TwoSpecials(NoTokenizer):
    special_tokens = {"<a>": 3, "<b>": 7}  # noqa: RUF012 (never changed)
    decode_settled = NoTokenizer.decode


def make_params(config=CONFIG):
    """Returns parameters whose texts vary, with exits that often agree with the last layer."""
    params = random_params(config)
    layers = jax.tree.map(lambda a: 0.7 * a if a.ndim > 2 else a, params["layers"])
    return {name: 4 * a if name == "lm_head" else a for name, a in params.items()} | {"layers": layers}


@pytest.fixture(scope="module")
def model():
    return Model(CONFIG, make_params(), NoTokenizer([STOP]))


@pytest.fixture(scope="module")
def expected(model):
    return lsjax.generate(model, PROMPTS, NEW).tokens


@pytest.mark.parametrize("ids", [(17,), (STOP,), HALF, ALL], ids=["one", "stop", "half", "all"])
def test_greedy_tokens_are_those_of_the_whole_vocabulary(model, expected, ids):
    result = lsjax.generate(model, PROMPTS, NEW, SelfSpeculative(2, 3, draft_vocabulary=ids))
    assert result.tokens == expected
    kept = {token for row in expected for token in row} & {*ids, STOP}
    assert len(kept) < 3 or sum(stats["accepted"] for stats in result.stats) > 0


def test_the_likeliest_token_is_often_outside_half_of_the_ids(expected):
    outside = [token not in HALF for row in expected for token in row]
    assert 0.25 < np.mean(outside) < 0.75


@pytest.fixture(scope="module")
def after_prompts(model):
    """Returns the state after the prompts, from which rounds of drafts begin."""
    weights, batch = model.decoder_weights(), PromptBatch.make(model, PROMPTS, GenerationConfig(NEW))

    @jax.jit
    def read():
        cache = init_cache(CONFIG, 3, 48, jnp.float32)
        logits, cache = prefill(weights, batch.tokens, batch.lengths, cache, CONFIG, range(3))
        first = jnp.argmax(logits, -1).astype(jnp.int32)
        lengths, stop = jnp.asarray(batch.lengths), jnp.array([STOP])
        return begin(cache, first, lengths, jnp.int32(NEW), stop, NEW + 8, max_drafts=3)

    return read()


def samplers():
    keys = jax.random.key_data(jax.random.split(jax.random.key(4), 3))
    filters = np.float32(0.7), np.int32(12), np.float32(0.9)
    return {"greedy": Greedy(), "sampled": Sampled(keys, *filters), "coupled": Coupled(keys, *filters)}


@pytest.mark.parametrize("name", samplers())
def test_all_ids_are_bit_for_bit_the_whole_head(model, after_prompts, name):
    weights = model.decoder_weights()
    drafted = jax.jit(lambda weights: draft(weights, after_prompts, CONFIG, 1, 2, samplers()[name]))
    whole = drafted(weights)
    trimmed = drafted(weights | {DRAFT: trim_head(weights, np.array(ALL, np.int32))})
    assert jax.tree.structure(whole) == jax.tree.structure(trimmed)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(trimmed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_drafts_are_drawn_by_the_head_of_the_ids_alone(model, after_prompts):
    """Drafts and their probabilities against logits of the shortened model: filters see the subset, the rest is 0."""
    ids = np.sort(np.array(HALF, np.int32))
    weights = model.decoder_weights() | {DRAFT: trim_head(model.decoder_weights(), ids)}
    keys = samplers()["sampled"].keys
    drafted = jax.jit(lambda sampler: draft(weights, after_prompts, CONFIG, 1, 1, sampler))
    texts = np.zeros((3, 16), np.int32)
    for row, prompt in enumerate(PROMPTS):
        texts[row, : len(prompt) + 1] = [*prompt, int(after_prompts.pending[row])]
    logits = np.asarray(forward(model.params, texts, CONFIG, jnp.array([1.0, 0.0, 0.0])))
    logits = [logits[row, len(prompt), ids] for row, prompt in enumerate(PROMPTS)]
    assert drafted(Greedy()).tokens[:, 0].tolist() == [ids[row.argmax()] for row in logits]
    for s in (Sampling(0.6), Sampling(0.8, top_k=2), Sampling(1.2, top_p=0.5)):
        sampler = Sampled(keys, np.float32(s.temperature), np.int32(s.top_k), np.float32(s.top_p))
        found = drafted(sampler)
        for row in range(3):
            p = np.zeros(40)
            p[ids] = filtered(logits[row], s)
            np.testing.assert_allclose(np.exp(found.log_probs[row, 0]), p, atol=1e-5)
            assert p[found.tokens[row, 0]] > 0


def filtered(logits, s: Sampling) -> np.ndarray:
    """Computes probabilities by the definitions: temperature, then top_k, then top_p."""
    p = np.exp(np.float64(logits) / s.temperature)
    p /= p.sum()
    order = np.argsort(-p)
    if s.top_k:
        p[order[s.top_k :]] = 0
    if s.top_p < 1:
        p[order[int(np.searchsorted(np.cumsum(p[order]), s.top_p)) + 1 :]] = 0
    return p / p.sum()


def test_ties_go_to_the_smallest_id():
    subset = Subset(jnp.array([4, 9, 30]), 40)
    tokens, _ = Greedy().choose(jnp.array([[1.0, 1.0, 1.0], [0.0, 2.0, 2.0]]), jnp.zeros(2, jnp.int32), subset)
    assert tokens.tolist() == [4, 9]


def test_the_verifier_goes_on_from_the_drafts_states(model, after_prompts):
    """A round saves the products with the other rows in each draft, and no layer runs twice."""
    weights, stop = model.decoder_weights(), jnp.array([STOP])

    def flops(weights):
        def loop(weights):
            return self_speculative_loop(weights, after_prompts, jnp.int32(NEW), stop, CONFIG, 2, 3)

        return count_flops(loop, weights)

    padded_rows, drafts, saved = 4, 3, 40 - 5
    trimmed = weights | {DRAFT: trim_head(weights, np.arange(5, dtype=np.int32))}
    assert flops(weights) - flops(trimmed) == 2 * padded_rows * drafts * saved * CONFIG.width


def test_it_goes_with_int8_drafts_copies_and_waiting_prompts(model, expected):
    prompts, strategy = [*PROMPTS, [4, 5, 6] * 4], SelfSpeculative(2, 3, "int8", lookup=4, draft_vocabulary=HALF)
    result = lsjax.generate(model, prompts, NEW, strategy, batch_size=3)
    assert result.tokens[:3] == expected
    assert result.tokens[3] == lsjax.generate(model, [prompts[3]] * 3, NEW).tokens[0]
    assert result.stats[0]["draft_vocabulary"] == len(HALF)


def test_coupled_draws_are_those_of_autoregressive_sampling(model):
    """Copied tokens outside the list are judged too, and every emitted token is autoregressive sampling's own."""
    s, strategy = Sampling(0.3, coupled=True), SelfSpeculative(2, 3, lookup=4, draft_vocabulary=HALF)
    drafted = lsjax.generate(model, PROMPTS, NEW, strategy, s, seed=5)
    assert drafted.tokens == lsjax.generate(model, PROMPTS, NEW, sampling=s, seed=5).tokens
    assert 0 < sum(row["accepted"] for row in drafted.stats) < sum(row["drafted"] for row in drafted.stats)


def test_coupled_drafts_of_all_layers_are_kept_wherever_the_list_has_the_token(model):
    """Noise belongs to token ids: the drafter then draws the verifier's token, unless the list lacks it."""
    ids = sorted({*ALL} - {*range(0, 39, 4)})
    s = Sampling(1.0, coupled=True)
    result = lsjax.generate(model, PROMPTS, NEW, SelfSpeculative(3, 3, draft_vocabulary=ids), s, seed=3)
    assert result.tokens == lsjax.generate(model, PROMPTS, NEW, sampling=s, seed=3).tokens
    for tokens, stats in zip(result.tokens, result.stats, strict=True):
        emitted, rounds, accepted = 1, 0, 0
        while emitted < len(tokens):
            ahead = [token in ids for token in tokens[emitted : emitted + 3]]
            kept = ahead.index(False) if False in ahead else len(ahead)
            emitted, rounds, accepted = emitted + kept + 1, rounds + 1, accepted + kept
        assert (stats["rounds"], stats["accepted"]) == (rounds, accepted)
    assert any(stats["accepted"] < stats["drafted"] for stats in result.stats)


@pytest.mark.parametrize("in_int8", [False, True], ids=["float32", "int8"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
def test_the_rows_are_those_of_the_head(in_int8, tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    model = Model(config, make_params(config), NoTokenizer([STOP]))
    model = quantize(model) if in_int8 else model
    head = model.draft_head((3, 8), model.decoder_weights())
    assert head[TOKEN_IDS].tolist() == [3, 8, STOP]
    params = model.params
    whole = params["lm_head"] if in_int8 else (params["embed"] if tied else params["lm_head"].T,)
    for rows, all_rows in zip(head["lm_head"], whole, strict=True):
        np.testing.assert_array_equal(rows, np.asarray(all_rows)[[3, 8, STOP]])


def test_a_tied_model_in_int8_gives_its_own_tokens():
    config = dataclasses.replace(CONFIG, tie_embeddings=True)
    model = quantize(Model(config, make_params(config), NoTokenizer([STOP])))
    result = lsjax.generate(model, PROMPTS, NEW, SelfSpeculative(1, 3, draft_vocabulary=HALF))
    assert result.tokens == lsjax.generate(model, PROMPTS, NEW).tokens


def test_split_over_devices_it_gives_the_tokens_of_one():
    """The rows are split as the head is, or whole on every device where their number does not divide."""
    config = dataclasses.replace(CONFIG, num_kv_heads=2)
    alone = Model(config, make_params(config), NoTokenizer([STOP]))
    shardings = tree_shardings(alone.params, make_mesh(MeshConfig(1, 1, 2), jax.devices()[:2]))
    split = dataclasses.replace(alone, params=jax.device_put(alone.params, shardings))
    for ids, parts in ((HALF[:9], 2), (HALF[:10], 1)):  # and the stop token
        rows = split.draft_head(ids, split.decoder_weights())["lm_head"].kernel
        assert rows.addressable_shards[0].data.size * parts == rows.size
    strategy = SelfSpeculative(1, 3, draft_vocabulary=HALF[:9])
    expected, found = (lsjax.generate(m, PROMPTS, NEW, strategy) for m in (alone, split))
    assert found.tokens == expected.tokens == lsjax.generate(alone, PROMPTS, NEW).tokens
    assert [s["accepted"] for s in found.stats] == [s["accepted"] for s in expected.stats]


def test_other_ids_of_the_same_number_do_not_compile_anew(model):
    lsjax.generate(model, PROMPTS, NEW, SelfSpeculative(2, 3, draft_vocabulary=HALF))
    before = PROGRAM_CACHE.misses
    others = [index for index in ALL if index not in (*HALF, STOP)]
    others = SelfSpeculative(2, 3, draft_vocabulary=others[: len({*HALF, STOP}) - 1])
    lsjax.generate(model, PROMPTS, NEW, others)
    assert PROGRAM_CACHE.misses == before


def test_a_draft_reads_only_its_rows(model):
    batch, c = PromptBatch.make(model, PROMPTS, GenerationConfig(NEW)), model.config
    whole, trimmed = (SelfSpeculative(2, 3, draft_vocabulary=ids) for ids in (None, HALF))
    read = [bytes_per_round(DecodeProgram(c, s, batch).weights(model), c, s, 3, 40) for s in (whole, trimmed)]
    assert read[0] - read[1] == 3 * (40 - len({*HALF, STOP})) * c.width * 4


def test_the_report_names_the_vocabulary(model):
    strategy = SelfSpeculative(2, 3, draft_vocabulary=np.array(HALF))
    report = benchmark(model, PROMPTS[:1], [strategy], max_new_tokens=8, repeats=1)
    assert [run["draft_vocabulary"] for run in report["runs"]] == [None, 19]
    assert report["runs"][1]["matches_autoregressive"]
    json.dumps(report)
    assert label(strategy) == "self_speculative, exit layer 2, 3 drafts of 19 ids"
    assert hash(strategy) == hash(SelfSpeculative(2, 3, draft_vocabulary=list(HALF)))


@pytest.fixture
def on_disk(model, tmp_path):
    """Returns a model with two special tokens and a folder, in which lies a list of the tokens 39, 38, ..."""
    ranked = RankedTokens(np.arange(40)[::-1], np.arange(40), 40, "counted by hand")
    write_list(list_path(tmp_path), ranked)
    return dataclasses.replace(model, tokenizer=TwoSpecials([STOP]), path=str(tmp_path))


@pytest.mark.parametrize(
    ("vocabulary", "ids"),
    [
        (5, [3, 7, 37, 38, 39]),
        (1, [3, 7, 39]),
        (40, list(ALL)),
        ((0, 12, 7), [0, 3, 7, 12, 39]),
        ([39], [3, 7, 39]),
    ],
)
def test_the_vocabulary_is_the_most_frequent_tokens_and_always_the_special_ones(on_disk, vocabulary, ids):
    strategy = SelfSpeculative(2, 3, draft_vocabulary=vocabulary)
    head = on_disk.draft_head(strategy.draft_vocabulary, on_disk.decoder_weights())
    assert head[TOKEN_IDS].tolist() == ids
    np.testing.assert_array_equal(head["lm_head"].kernel, np.asarray(on_disk.params["lm_head"]).T[ids])


def test_a_path_names_a_list(on_disk, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"ids": [8, 2]}))
    strategy = SelfSpeculative(2, 3, draft_vocabulary=path)
    assert draft_token_ids(strategy.draft_vocabulary, on_disk.tokenizer, 40, "").tolist() == [2, 3, 7, 8, 39]
    assert strategy.settings()["draft_vocabulary"] == str(path)
    assert label(strategy) == f"self_speculative, exit layer 2, 3 drafts of the ids in {path}"


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ((), "draft_vocabulary is empty"),
        (np.zeros(0, np.int32), "draft_vocabulary is empty"),
        ((4, 9, 4), "draft_vocabulary holds id 4 twice"),
        ((4, -1), r"draft_vocabulary holds id -1, outside the vocabulary 0\.\.39"),
        ((4, 40), r"draft_vocabulary holds id 40, outside the vocabulary 0\.\.39"),
        ((4, 1.5), "token ids or the path of a list, got 1.5"),
        ((True,), "token ids or the path of a list, got True"),
        ([[1, 2]], r"token ids or the path of a list, got \[1, 2\]"),
        (0, "draft_vocabulary must be at least 1 token, got 0"),
        (2.5, "token ids or the path of a list, got 2.5"),
        ("", "token ids or the path of a list, got ''"),
        ("no/such.json", "cannot read no/such.json"),
        (64, "this model was not loaded from files: give token ids"),
    ],
)
def test_a_wrong_vocabulary_is_named_in_one_line(model, vocabulary, message):
    with pytest.raises(UserError, match=message) as caught:
        lsjax.generate(model, PROMPTS, 4, SelfSpeculative(2, 3, draft_vocabulary=vocabulary))
    assert "\n" not in str(caught.value)


def test_a_missing_or_short_list_is_named(on_disk, tmp_path):
    with pytest.raises(UserError, match=r"draft_vocabulary 41 is more than the 40 tokens that .* lists"):
        lsjax.generate(on_disk, PROMPTS, 4, SelfSpeculative(2, 3, draft_vocabulary=41))
    list_path(tmp_path).unlink()
    with pytest.raises(UserError, match=rf"make it with: lsjax draft_vocabulary --model={tmp_path} --corpus="):
        lsjax.generate(on_disk, PROMPTS, 4, SelfSpeculative(2, 3, draft_vocabulary=64))
    with pytest.raises(UserError, match="draft_vocabulary needs drafts"):
        lsjax.generate(on_disk, PROMPTS, 4, SelfSpeculative(2, 0, lookup=3, draft_vocabulary=64))
