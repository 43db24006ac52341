""" "auto" settings: the rounds counted from a text are those that happen, and the choice is the best."""

import dataclasses
import itertools

import numpy as np
import pytest

from lsjax.benchmarks.decoding import benchmark
from lsjax.decoding.batch import GenerationConfig, PromptBatch
from lsjax.decoding.model import Model
from lsjax.decoding.sampling import Greedy
from lsjax.decoding.strategies import Autoregressive, EarlyExit, Sampling, SelfSpeculative
from lsjax.errors import UserError
from lsjax.generation import generate
from lsjax.io.draft_vocabulary import RankedTokens, list_path, write_list
from lsjax.model.transformer import forward
from lsjax.tuning import choices, cost_model, round_times
from lsjax.tuning.acceptance import _rank, draft_acceptance
from lsjax.tuning.choices import candidates, vocabularies
from lsjax.tuning.cost_model import predict, resolve_auto
from lsjax.tuning.decoded_batch import DecodedBatch, read_decoded, read_with_vocabularies
from lsjax.tuning.round_times import interpolate
from lsjax.tuning.tune import tune
from tests.helpers.prompts import NEW, PROMPTS, NoTokenizer


@pytest.fixture(scope="module")
def model(varied, varied_params):
    return Model(varied, varied_params, NoTokenizer())


@pytest.fixture(scope="module")
def text(model):
    """Returns the prompts, read once with their continuations."""
    return read_decoded(
        model,
        model.params,
        PromptBatch.make(model, PROMPTS, GenerationConfig(NEW)),
        generate(model, PROMPTS, NEW).tokens,
    )


@pytest.mark.parametrize(("exit_layer", "drafts"), [(1, 8), (2, 3), (3, 1), (4, 5)])
def test_counted_rounds_are_those_that_happen(model, text, exit_layer, drafts):
    stats = generate(model, PROMPTS, NEW, SelfSpeculative(exit_layer, drafts)).stats
    rounds = cost_model.expected_rounds(text.acceptance, text.tokens, drafts)[exit_layer - 1]
    assert rounds.tolist() == [row["rounds"] for row in stats]


HALF = tuple(np.random.default_rng(0).permutation(320)[:160].tolist())


@pytest.mark.parametrize(("exit_layer", "drafts"), [(2, 3), (4, 5)])
def test_counted_rounds_of_a_draft_vocabulary_are_those_that_happen(model, exit_layer, drafts):
    """One pass counts them for several vocabularies."""
    batch, tokens = PromptBatch.make(model, PROMPTS, GenerationConfig(NEW)), generate(model, PROMPTS, NEW).tokens
    texts = read_with_vocabularies(model, model.params, batch, tokens, (None, HALF, (1, 2)))
    counted = [cost_model.expected_rounds(text.acceptance, text.tokens, drafts)[exit_layer - 1] for text in texts]
    assert counted[0].sum() < counted[1].sum() < counted[2].sum()
    for vocabulary, rounds in zip((None, HALF), counted, strict=False):
        strategy = SelfSpeculative(exit_layer, drafts, draft_vocabulary=vocabulary)
        assert rounds.tolist() == [row["rounds"] for row in generate(model, PROMPTS, NEW, strategy).stats]


def test_rounds_are_counted_to_the_stop_token(varied, varied_params, text):
    plain = generate(Model(varied, varied_params, NoTokenizer()), PROMPTS, NEW).tokens
    stopping = Model(varied, varied_params, NoTokenizer([plain[1][7]]))
    tokens = generate(stopping, PROMPTS, NEW).tokens
    assert min(map(len, tokens)) < NEW
    ended = read_decoded(stopping, stopping.params, PromptBatch.make(stopping, PROMPTS, GenerationConfig(NEW)), tokens)
    stats = generate(stopping, PROMPTS, NEW, SelfSpeculative(2, 3)).stats
    rounds = cost_model.expected_rounds(ended.acceptance, ended.tokens, 3)[1]
    assert rounds.tolist() == [row["rounds"] for row in stats]


def rounds_by_enumeration(chances, drafts: int) -> float:
    """Enumerates how the drafts of a text may fare, each way with its probability; the fate of draft i is drawn
    beforehand."""
    total = 0.0
    for kept in itertools.product((False, True), repeat=len(chances)):
        out, rounds = 1, 0
        while out < len(chances):
            run = list(itertools.takewhile(bool, kept[out : out + drafts]))
            out, rounds = out + len(run) + 1, rounds + 1
        total += rounds * np.prod([c if k else 1 - c for c, k in zip(chances, kept, strict=True)])
    return total


@pytest.mark.parametrize("drafts", [1, 2, 3, 12])
def test_expected_rounds_are_the_mean_over_every_way_drafts_may_fare(drafts):
    chances = np.random.default_rng(0).uniform(size=(2, 9))
    found = cost_model.expected_rounds(chances, np.array([9, 9]), drafts)
    np.testing.assert_allclose(found, [rounds_by_enumeration(row, drafts) for row in chances])
    assert cost_model.expected_rounds(chances, np.array([1, 9]), drafts)[0] == 0


def test_the_chance_of_a_sampled_draft_is_what_the_distributions_share(model):
    """The chance is sum_v min(p, q), with p and q by their definitions in numpy, from logits of the whole and the
    shortened model."""
    new = generate(model, PROMPTS, 4).tokens
    found = read_decoded(
        model, model.params, PromptBatch.make(model, PROMPTS, GenerationConfig(4, Sampling(0.7))), new
    ).acceptance
    texts = np.zeros((3, 21), np.int32)
    for row, (prompt, more) in enumerate(zip(PROMPTS, new, strict=True)):
        texts[row, : len(prompt) + 4] = [*prompt, *more]

    def probabilities(mask):
        e = np.exp(np.float64(forward(model.params, texts, model.config, np.float32(mask))) / 0.7)
        return e / e.sum(axis=-1, keepdims=True)

    batch = PromptBatch.make(model, PROMPTS, GenerationConfig(4, Sampling(0.7)))
    (trimmed,) = read_with_vocabularies(model, model.params, batch, new, (HALF,))
    q, p = probabilities([1, 1, 0, 0]), probabilities([1, 1, 1, 1])
    of_half = q * np.isin(np.arange(320), HALF)
    of_half /= of_half.sum(axis=-1, keepdims=True)
    share, share_of_half = np.minimum(q, p).sum(axis=-1), np.minimum(of_half, p).sum(axis=-1)
    for row, prompt in enumerate(PROMPTS):
        new_tokens = slice(len(prompt) - 1, len(prompt) + 3)
        np.testing.assert_allclose(trimmed.acceptance[1, row], share_of_half[row, new_tokens], rtol=1e-4)
        np.testing.assert_allclose(found[1, row], share[row, len(prompt) - 1 : len(prompt) + 3], rtol=1e-4)
        np.testing.assert_allclose(found[3, row], 1, rtol=1e-5)


def test_exits_rank_the_tokens_of_the_text(model):
    """The ranks are those of sorting the logits of the shortened model in numpy."""
    new = generate(model, PROMPTS, NEW).tokens
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    texts = np.zeros((3, lengths.max() + NEW), np.int32)
    for row, (prompt, more) in enumerate(zip(PROMPTS, new, strict=True)):
        texts[row, : len(prompt) + NEW] = [*prompt, *more]
    known = np.stack([np.ones(320, bool), np.isin(np.arange(320), HALF)])
    found = draft_acceptance(model.params, texts, lengths, Greedy(), model.config, NEW, np.dtype("float32"), known)
    assert found.rank.shape == found.chance.shape == (2, 4, 3, NEW)
    np.testing.assert_array_equal(found.rank[0] == 0, found.chance[0] == 1)
    assert not np.any(found.rank[0, 3])
    logits = np.array(forward(model.params, texts, model.config, np.float32([1, 1, 0, 0])))
    clear = []
    for row, tokens in enumerate(new):
        for i, token in enumerate(tokens):
            for vocabulary, rank in zip(known, found.rank[:, 1, row, i], strict=True):
                of_exit = logits[row, lengths[row] - 1 + i]
                if not vocabulary[token]:
                    assert rank >= vocabulary.sum()
                    continue
                above, not_below = (int(np.sum(of_exit[vocabulary] > of_exit[token] + by)) for by in (1e-4, -1e-4))
                assert above <= rank < not_below  # the token itself is not below
                clear.append(not_below - above == 1)
    assert np.mean(clear) > 0.9
    assert len(np.unique(found.rank[0, 1])) > 5


def test_of_equal_logits_the_smaller_id_ranks_first():
    logits = np.float32([[2, 5, 5, 1, 5, -np.inf], [0, 0, 0, 0, 0, 0]])
    order = [sorted(range(6), key=lambda token, row=row: (-row[token], token)) for row in logits]
    for token in range(6):
        expected = [row.index(token) for row in order]
        assert _rank(np.array([token, token]), logits).tolist() == expected


def test_the_choice_is_the_best_by_brute_force():
    """Texts and times are those of a made-up device; the time of every setting is simulated round by round."""
    random = np.random.default_rng(1)
    kept = random.uniform(size=(6, 2, 40)) < np.linspace(0.4, 0.98, 6)[:, None, None]
    texts = [DecodedBatch(kept[:, :1] * 1.0, np.array([40]), 1), DecodedBatch(kept * 1.0, np.array([17, 30]), 2)]

    def time(e: int, d: int) -> float:
        """Returns the milliseconds of a round: bilinear in exit layer and drafts."""
        return 12 + 0.3 * d + 1.2 * d * e

    corners = {(e, d): time(e, d) for e in (1, 5) for d in (1, 9)}
    table = predict(texts, 14.0, corners, range(1, 6), range(1, 10))

    def rounds(agree, tokens, d):
        out, count = 1, 0
        while out < tokens:
            run = 0
            while run < d and agree[out + run : out + run + 1].all() and out + run < len(agree):
                run += 1
            out, count = out + run + 1, count + 1
        return count

    def simulated(e, d):
        alone = rounds(kept[e - 1, 0], 40, d)
        pair = [rounds(kept[e - 1, row], n, d) for row, n in ((0, 17), (1, 30))]
        ratios = [39 * 14.0 / (alone * time(e, d)), 29 * 14.0 / (max(pair) * time(e, d))]
        return sum(ratios) / 2, (39 + 16 + 29) / (alone + sum(pair))

    assert len(table) == 45
    for setting in table:
        expected = simulated(setting.exit_layer, setting.num_speculations)
        assert (setting.speedup, setting.tokens_per_round) == pytest.approx(expected)
    tuning = cost_model.Tuning(table, 14.0)
    best = max(itertools.product(range(1, 6), range(1, 10)), key=lambda pair: simulated(*pair)[0])
    assert (tuning.strategy.exit_layer, tuning.strategy.num_speculations) == best
    assert 1 < best[0] < 5  # neither end of the grid, or a careless choice would do
    assert 1 < best[1] < 9


def test_times_between_the_measured_ones_lie_on_lines():
    corners = {(2, 1): 1.0, (2, 3): 3.0, (2, 9): 6.0, (6, 1): 5.0, (6, 3): 7.0, (6, 9): 16.0}
    assert [interpolate(corners, *pair) for pair in corners] == list(corners.values())
    assert interpolate(corners, 4, 3) == 5.0
    assert interpolate(corners, 2, 6) == 4.5
    assert interpolate(corners, 3, 6) == pytest.approx(4.5 + (11.5 - 4.5) / 4)
    assert interpolate({(3, 4): 2.5}, 3, 4) == 2.5
    assert round_times.corners_of((3,), (4,)) == [(3, 4)]
    assert round_times.corners_of(range(1, 10), range(1, 13)) == [(1, 1), (1, 5), (1, 12), (9, 1), (9, 5), (9, 12)]


def test_tokens_a_round_are_predicted_exactly_and_stand_in_the_report(model):
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[2][::-1], PROMPTS[0][::-1]]  # of one length to a program
    tuning = tune(model, prompts, NEW, SelfSpeculative("auto", 3), batch_size=2)
    assert tuning.strategy.num_speculations == 3
    own = [setting for setting in tuning.table if not setting.draft_weights]
    assert [setting[:2] for setting in own] == [(1, 3), (2, 3), (3, 3)]
    strategies = [EarlyExit(3), SelfSpeculative(1, 3), SelfSpeculative(3, 3)]
    report = benchmark(model, prompts, strategies, max_new_tokens=NEW, batch_size=2, repeats=1, tuning=tuning)
    plain, early, *tuned = report["runs"]
    assert tuned
    for run in tuned:
        assert run["predicted_tokens_per_round"] == pytest.approx(run["tokens_per_round"], rel=1e-12)
        assert run["predicted_speedup"] > 0
    for run in (plain, early):
        assert run["predicted_speedup"] is run["predicted_tokens_per_round"] is None


def test_a_draft_vocabulary_is_one_more_choice_for_a_model_with_a_list(model, tmp_path, monkeypatch):
    """The parts are powers of two of the list; the head's saving is timed once and counts for each draft."""
    listed = dataclasses.replace(model, path=str(tmp_path))
    assert vocabularies(SelfSpeculative("auto", 3), listed) == (None,)
    ranked = RankedTokens(np.arange(320)[::-1], np.arange(320), 320, "counted by hand")
    write_list(list_path(tmp_path), ranked)
    assert vocabularies(SelfSpeculative("auto", 3), listed) == (None, 64, 32)
    assert vocabularies(SelfSpeculative("auto", 3, draft_vocabulary=HALF), listed) == (HALF,)
    write_list(list_path(tmp_path), ranked._replace(ids=ranked.ids[:40], counts=ranked.counts[:40]))
    assert vocabularies(SelfSpeculative("auto", 3), listed) == (None, 32)

    times = {None: 1.0, 32: 0.25}  # milliseconds that the head adds to a draft
    timed = []

    def made_up_times(model, batch, strategies, note):
        timed.extend(strategies[1:])
        return [9.0, *(10 + s.num_speculations * (s.exit_layer + times[s.draft_vocabulary]) for s in strategies[1:])]

    monkeypatch.setattr(round_times, "round_times_of", made_up_times)
    monkeypatch.setattr(choices, "draft_weights", lambda *_: (None,))
    tuning = tune(listed, PROMPTS, NEW, SelfSpeculative("auto", "auto"))
    assert len(tuning.table) == 2 * 3 * 12
    for setting in tuning.table:
        head = times[setting.draft_vocabulary]
        by_hand = 10 + setting.num_speculations * (setting.exit_layer + head)
        assert setting.milliseconds_per_round == pytest.approx(by_hand)
    assert [s for s in timed if s.draft_vocabulary] == [SelfSpeculative(1, 12, draft_vocabulary=32)]
    best = max(tuning.table, key=lambda setting: setting.speedup)
    assert tuning.strategy == SelfSpeculative(*best[:2], draft_vocabulary=best.draft_vocabulary)
    assert tuning.at(SelfSpeculative(2, 3, draft_vocabulary=32)).draft_vocabulary == 32
    assert tuning.at(SelfSpeculative(2, 3)).draft_vocabulary is None
    assert tuning.at(SelfSpeculative(2, 3, draft_vocabulary=8)) is None
    stats = generate(listed, PROMPTS, NEW, SelfSpeculative(2, 3, draft_vocabulary=32)).stats
    predicted = tuning.at(SelfSpeculative(2, 3, draft_vocabulary=32)).tokens_per_round
    assert predicted == pytest.approx(sum(s["new_tokens"] - 1 for s in stats) / sum(s["rounds"] for s in stats))


@pytest.mark.parametrize(("speedup", "chosen"), [(1.2, SelfSpeculative(2, 5)), (0.9, Autoregressive())])
def test_generate_decodes_by_the_choice_where_it_pays(model, monkeypatch, speedup, chosen):
    setting = cost_model.Setting(2, 5, 2.0, 1.0, speedup)
    worse = setting._replace(num_speculations=4, speedup=speedup - 0.1)
    monkeypatch.setattr(cost_model, "measure_settings", lambda *_, **__: cost_model.Tuning((worse, setting), 1.0))
    result = generate(model, PROMPTS, NEW, SelfSpeculative("auto", "auto"))
    assert result.tokens == generate(model, PROMPTS, NEW).tokens
    assert result.stats[0]["strategy"] == chosen.name
    assert result.stats[0]["num_speculations"] == getattr(chosen, "num_speculations", None)


def test_a_text_without_a_second_token_is_not_tuned(model):
    batch = PromptBatch.make(model, PROMPTS, GenerationConfig(1))

    assert resolve_auto(SelfSpeculative("auto", 2), model, batch) == Autoregressive()
    with pytest.raises(UserError, match="no speed to tune"):
        tune(model, PROMPTS, 1)


def test_candidates_keep_what_is_given(varied):
    assert candidates(SelfSpeculative("auto", 3), 12) == (tuple(range(1, 10)), (3,))
    assert candidates(SelfSpeculative(11, "auto"), 12) == ((11,), tuple(range(1, 13)))
    assert candidates(SelfSpeculative("auto", "auto"), 1)[0] == (1,)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (SelfSpeculative("automatic", 2), "exit_layer must be a number, or \"auto\" .* got 'automatic'"),
        (SelfSpeculative(2, 1.5), "num_speculations must be a number, .* got 1.5"),
        (SelfSpeculative(9, "auto"), "exit_layer 9 is out of range"),
        (SelfSpeculative("auto", 0), "num_speculations 0 is out of range"),
        (EarlyExit("auto"), "exit_layer must be a number"),
    ],
)
def test_bad_settings_are_named(model, strategy, message):
    with pytest.raises(UserError, match=message):
        generate(model, PROMPTS, 4, strategy)
    if isinstance(strategy, SelfSpeculative):
        with pytest.raises(UserError, match=message):
            tune(model, PROMPTS, 4, dataclasses.replace(strategy))
