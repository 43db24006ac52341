""" "auto" with drafts in int8: their rounds are those that happen, and their times come from two timings."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import lsjax
from lsjax.decoding.batch import GenerationConfig, PromptBatch
from lsjax.decoding.model import Model, quantize
from lsjax.decoding.strategies import SelfSpeculative
from lsjax.errors import UserError
from lsjax.io.draft_vocabulary import RankedTokens, list_path, write_list
from lsjax.model.quantization import states_in_int8
from lsjax.model.transformer import forward
from lsjax.tuning import round_times
from lsjax.tuning.acceptance import expected_rounds
from lsjax.tuning.choices import Choices, Drafter, choices_of
from lsjax.tuning.decoded_batch import read_batches
from lsjax.tuning.tuned_settings import FILE, read_settings
from tests.helpers.prompts import NEW, PROMPTS, NoTokenizer

BOTH = SelfSpeculative("auto", "auto")
HALF = tuple(np.random.default_rng(0).permutation(320)[:160].tolist())


@pytest.fixture(scope="module")
def model(varied, varied_params):
    """Returns a model whose int8 layers are far off: the first input of four weights is 30 times as large as others.

    The norms before them undo it, so the model itself is as it was.
    """

    def scale(path, leaf):
        name = path[-2].key if path[-1].key == "scale" else path[-1].key
        factors = {"attention_norm": 1 / 30, "feed_forward_norm": 1 / 30, "qkv": 30, "gate_up": 30}
        return leaf.at[:, 0].multiply(factors.get(name, 1))

    layers = jax.tree_util.tree_map_with_path(scale, varied_params["layers"])
    return Model(varied, varied_params | {"layers": layers}, NoTokenizer())


@pytest.fixture(scope="module")
def expected(model):
    return lsjax.generate(model, PROMPTS, NEW).tokens


def read(model, expected, weights=(None, "int8"), vocabularies=(None,)):
    """Returns what is read of the prompts, by drafter."""
    batch = PromptBatch.make(model, PROMPTS, GenerationConfig(NEW))
    texts = read_batches(model, [batch], [expected], Choices((1, 2, 3), (3,), weights, vocabularies))
    return {drafter: text for drafter, (text,) in texts.items()}


def round_time(strategy, saved: dict | None = None) -> float:
    """Returns the milliseconds of a round on a made-up device.

    A draft takes 1 ms for each layer and 2 ms for the head, or a quarter of both in int8, less what a draft vocabulary
    saves (`saved`, by drafter). Verification takes 1.5 ms for each layer, and 0.25 ms more for each draft. All 4 layers
    verify int8 drafts; the layers after the exit verify own drafts, the last of which runs through the layers before.
    """
    e, d, in_int8 = strategy.exit_layer, strategy.num_speculations, strategy.draft_weights is not None
    draft = (e + 2) * (0.25 if in_int8 else 1)
    draft -= (saved or {}).get((strategy.draft_weights, strategy.draft_vocabulary), 0)
    verify = 1.5 + 0.25 * d
    return 5 + d * draft + (4 * verify if in_int8 else e + (4 - e) * verify)


@pytest.fixture
def timed(monkeypatch):
    """Returns the list of the strategies that are timed, on the made-up device."""
    return time_by(monkeypatch, round_time)


def time_by(monkeypatch, time) -> list:
    timed = []

    def made_up_times(model, batch, strategies, note):
        timed.extend(strategies[1:])
        return [20.0, *map(time, strategies[1:])]

    monkeypatch.setattr(round_times, "round_times_of", made_up_times)
    return timed


@pytest.mark.parametrize("exit_layer", [1, 2, 3])
def test_int8_drafts_are_accepted_where_the_rounded_layers_agree_with_the_model(model, expected, exit_layer):
    """The logits are those of `forward` with a whole model in int8, cut to its first layers."""
    int8 = states_in_int8(quantize(model).params, rounded=True)
    mask = np.float32(np.arange(4) < exit_layer)
    texts = read(model, expected)
    for row, (prompt, new) in enumerate(zip(PROMPTS, expected, strict=True)):
        text = np.array([[*prompt, *new]])
        drafted = np.asarray(forward(int8, text, model.config, mask))[0, len(prompt) - 1 : -1].argmax(-1)
        assert texts[Drafter("int8")].acceptance[exit_layer - 1, row].tolist() == (drafted == new).tolist()
    assert np.any(texts[Drafter("int8")].acceptance[exit_layer - 1] != texts[Drafter()].acceptance[exit_layer - 1])


@pytest.mark.slow
def test_counted_rounds_of_int8_drafts_are_nearly_those_that_happen(model, expected):
    """They are nearly those, since the pass rounds the keys and values before a round too."""
    texts, own, counted, happened = read(model, expected, vocabularies=(None, HALF)), [], [], []
    for exit_layer, drafts, vocabulary in ((1, 8, None), (2, 3, None), (2, 3, HALF), (3, 5, None)):
        for rounds, weights in ((own, None), (counted, "int8")):
            text = texts[Drafter(weights, vocabulary)]
            rounds += expected_rounds(text.acceptance, text.tokens, drafts)[exit_layer - 1].tolist()
        strategy = SelfSpeculative(exit_layer, drafts, "int8", draft_vocabulary=vocabulary)
        happened += [row["rounds"] for row in lsjax.generate(model, PROMPTS, NEW, strategy).stats]
    differences = np.abs(np.array(counted) - happened)
    assert max(differences) <= 1
    assert sum(differences) <= 4
    assert own != happened


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [SelfSpeculative("auto", 3, "int8"), SelfSpeculative(2, "auto", "int8"), BOTH])
def test_auto_decodes_by_int8_drafts_and_leaves_every_token_as_it_was(model, expected, timed, strategy):
    result = lsjax.generate(model, PROMPTS, NEW, strategy)
    assert result.tokens == expected
    assert {row["draft_weights"] for row in result.stats} == {"int8"}
    for given in ("exit_layer", "num_speculations"):
        value = getattr(strategy, given)
        assert value in ("auto", result.stats[0][given])
    if strategy.draft_weights:
        assert {s.draft_weights for s in timed} == {"int8"}


def test_two_timings_give_those_of_every_setting_with_int8_drafts(model, timed):
    tuning = lsjax.tune(model, PROMPTS, NEW, BOTH)
    assert [s for s in timed if s.draft_weights] == [SelfSpeculative(e, 12, "int8") for e in (1, 3)]
    assert len(timed) == 6 + 2
    assert len({setting.strategy for setting in tuning.table}) == len(tuning.table) == 2 * 3 * 12
    for setting in tuning.table:
        assert setting.milliseconds_per_round == pytest.approx(round_time(setting.strategy))
        assert tuning.at(setting.strategy) == setting
    assert tuning.strategy.draft_weights == "int8"
    assert f"with {tuning.strategy.num_speculations} draft(s) in int8 is predicted to be the fastest" in str(tuning)
    assert tuning.at(dataclasses.replace(tuning.strategy, lookup=4)) is None


def test_one_exit_layer_is_timed_at_each_draft_length(model, timed):
    tuning = lsjax.tune(model, PROMPTS, NEW, SelfSpeculative(2, "auto"))
    drafters = (None, "int8")
    assert timed == [SelfSpeculative(2, d, weights) for weights in drafters for d in (1, 5, 12)]
    for setting in tuning.table:
        assert setting.milliseconds_per_round == pytest.approx(round_time(setting.strategy))


def test_one_timing_says_what_a_draft_vocabulary_saves_in_int8(model, tmp_path, monkeypatch):
    saved = {(None, 64): 1.5, (None, 32): 1.75, ("int8", 64): 0.375, ("int8", 32): 0.5}

    def time(strategy):
        return round_time(strategy, saved)

    timed = time_by(monkeypatch, time)
    listed = dataclasses.replace(model, path=str(tmp_path))
    write_list(list_path(tmp_path), RankedTokens(np.arange(320)[::-1], np.arange(320), 320, "counted by hand"))
    tuning = lsjax.tune(listed, PROMPTS, NEW, BOTH)
    assert len(timed) == 6 + 2 + 4
    assert len(tuning.table) == 6 * 3 * 12
    for setting in tuning.table:
        assert setting.milliseconds_per_round == pytest.approx(time(setting.strategy))


def test_int8_copies_that_only_tuning_needs_are_forgotten(model, timed):
    used = dataclasses.replace(model)
    kept = used.draft_weights(2)
    lsjax.tune(used, PROMPTS, NEW, BOTH)
    assert used._int8_drafters == {2: kept}


def test_a_model_in_int8_has_no_int8_drafts_to_choose(model):
    int8 = quantize(model)
    assert choices_of(BOTH, int8).draft_weights == (None,)
    assert choices_of(BOTH, model).draft_weights == (None, "int8")
    for call in (lsjax.tune, lsjax.generate):
        with pytest.raises(UserError, match="draft_weights: this model is in int8 already"):
            call(int8, PROMPTS, NEW, dataclasses.replace(BOTH, draft_weights="int8"))
    with pytest.raises(UserError, match="draft_weights must be \"int8\", or None for the model's own, got 'int4'"):
        lsjax.tune(model, PROMPTS, NEW, dataclasses.replace(BOTH, draft_weights="int4"))


@pytest.mark.slow
def test_a_table_holds_int8_drafts(timed, tmp_path):
    recorded = Path(__file__).parent.parent / "io" / "recorded" / "llama32"
    shutil.copytree(recorded, tmp_path / "model")
    model = lsjax.load(tmp_path / "model")
    table = lsjax.tune_table(model, ["the cat sat"], 6, temperatures=[0.0], batch_sizes=[1])
    (setting,) = table.settings
    assert setting.strategy.draft_weights == "int8"
    assert f"{setting.num_speculations} drafts in int8, predicted at" in str(setting)
    path = tmp_path / "model" / FILE
    assert read_settings(path, 3) == table
    timed.clear()
    result = lsjax.generate(model, ["the cat sat"], 6, BOTH)
    assert result.stats[0]["draft_weights"] == "int8"
    assert result.tokens == lsjax.generate(model, ["the cat sat"], 6).tokens
    assert not timed


def test_a_table_that_knows_no_int8_drafts_is_to_be_renewed(tmp_path):
    row = {"temperature": 0, "batch_size": 1, "exit_layer": 1, "num_speculations": 1, "draft_vocabulary": None}
    path = tmp_path / FILE
    path.write_text(json.dumps({"format": 1, "tuned_for": {}, "settings": [row | {"predicted_speedup": 1.5}]}))
    message = f"{path} is of an earlier version, which measured no drafts in int8: renew it with lsjax tune"
    with pytest.raises(UserError, match=message):
        read_settings(path, 3)
