"""Ablations: recipes are the paper's, runs resume, and the baseline at equal time is interpolated."""

import dataclasses
import json
import math

import numpy as np
import pytest

from lsjax.config import Config
from lsjax.errors import UserError
from lsjax.experiments.ablation import run
from lsjax.experiments.ablation.ablate import ablate
from lsjax.experiments.ablation.recipes import BASELINE, choose, recipes
from lsjax.experiments.ablation.report import Outcome, baseline_at_equal_time, findings, outcomes
from lsjax.layerskip.dropout import layer_dropout_rates
from lsjax.training.step import recipe_at

pytestmark = pytest.mark.usefixtures("compilation_cache")

GOOD_RESULT = json.dumps(
    {
        "profile": {"exit_layers": [1, 2], "loss": [2.5, 2.0], "accuracy": [0.1, 0.2], "agreement": [0.5, 1.0]},
        "evaluations": [{"step": 2, "loss": {"1": 2.5, "2": 2.0}}],
        "decoding": [
            {"exit_layer": 1, "num_speculations": 2, "acceptance_rate": None, "tokens_per_round": 2.0, "speedup": 1.5}
        ],
    }
)


@pytest.fixture
def small_run(tiny_run):
    training = dataclasses.replace(tiny_run.training, total_steps=4, log_every_steps=4)
    evaluation = dataclasses.replace(tiny_run.evaluation, every_steps=2, max_batches=1)
    model = dataclasses.replace(tiny_run.model, num_layers=2)
    return dataclasses.replace(tiny_run, model=model, training=training, evaluation=evaluation)


def test_recipes_are_what_they_say(tiny_run):
    known, layers = recipes(4), np.arange(4)
    paper = known["paper"].config(tiny_run, seed=3)
    last = recipe_at(tiny_run.training.total_steps - 1, paper)
    assert paper.training.seed == 3
    np.testing.assert_allclose(last.dropout_rates, 0.2 * (np.exp(layers * math.log(2) / 3) - 1), rtol=1e-5)
    assert recipe_at(1, paper).exit_active.tolist() == [False, True, False, True]  # R = 3
    plain = known[BASELINE].config(tiny_run, 0)
    assert recipe_at(5, plain).exit_active.tolist() == [False, False, False, True]
    assert not np.any(recipe_at(11, plain).dropout_rates)
    # The paper's Fig. 12: the same mean over the layers, at every step.
    settings = [known[name].layerskip for name in ("dropout", "constant-dropout")]
    rates = [
        layer_dropout_rates(4, s["dropout_max_rate"], 7, 12, s["dropout_depth_schedule"], s["dropout_time_schedule"])
        for s in settings
    ]
    assert float(np.mean(rates[0])) == pytest.approx(float(np.mean(rates[1])))
    assert len(set(np.asarray(rates[1]).tolist())) == 1
    assert recipe_at(0, known["focused"].config(tiny_run, 0)).exit_active.tolist() == [True, False, False, True]
    assert known["none-longer"].config(tiny_run, 0).training.total_steps == 15
    drafting = recipe_at(6, known["drafting"].config(tiny_run, 0))  # of 12 steps
    assert drafting.exit_active.tolist() == [True, True, False, True]
    np.testing.assert_allclose(drafting.exit_distillation, [0, 20 * 6 / 11, 0, 0], rtol=1e-6)
    for recipe in known.values():
        Config.from_dict(recipe.config(tiny_run, 0).to_dict())


def test_an_unknown_recipe_is_named():
    assert [recipe.name for recipe in choose(["paper"], 4)] == [BASELINE, "paper"]
    with pytest.raises(UserError, match=r"'papr'; the recipes are: none, .* paper"):
        choose(["papr"], 4)


def outcome(name: str, loss: float, step_time: float, history=((1, 3.0),)) -> Outcome:
    profile = {"exit_layers": [2, 4], "loss": [9.0, loss], "accuracy": [0, 0], "agreement": [0, 1]}
    evaluations = [{"step": step, "loss": {"2": value}} for step, value in history]
    return Outcome(
        recipes(4)[name], (0,), ({"profile": profile, "decoding": [], "evaluations": evaluations},), step_time
    )


def test_equal_time_is_read_off_between_shorter_and_longer_runs():
    """Set by hand: 3/4, 1, 5/4 of the steps gave 4, 3 and 2.5 nats, joined by lines in the logarithm of the steps."""
    plain = [outcome("none-shorter", 4.0, 1.0), outcome("none", 3.0, 1.0), outcome("none-longer", 2.5, 1.0)]

    def at(step_time):
        return baseline_at_equal_time(plain, outcome("paper", 3.1, step_time))

    assert at(1.0) == pytest.approx(3.0)
    assert at(0.75) == pytest.approx(4.0)
    assert at(math.sqrt(0.75)) == pytest.approx(3.5)
    assert at(math.sqrt(1.25)) == pytest.approx(2.75)
    assert at(1.25**2) == pytest.approx(2.0)  # beyond the longest, the line goes on
    assert math.isnan(baseline_at_equal_time(plain[1:2], outcome("paper", 3.1, 1.0)))


def test_findings_tell_a_loss_that_gets_worse():
    worse = outcome("none", 3.0, 1.0, [(1, 4.0), (2, 3.0), (3, 3.5)])
    better = outcome("paper", 3.0, 1.0, [(1, 4.0), (2, 3.5), (3, 3.0)])
    lines = findings([worse, better], 4)
    assert lines == [
        "none: the middle layer's loss gets worse while training (best 3.00, last 3.50)",
        "paper: the middle layer's loss does not get worse while training (best 3.00, last 3.00)",
    ]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("step_times.json", '{"none": "3"}'),
        ("step_times.json", '{"none": NaN}'),
        ("step_times.json", '{"none": -1.5}'),
        ("step_times.json", '{"none": null}'),
        ("step_times.json", "[1.5]"),
        ("step_times.json", '{"none": 1.'),
        ("none/seed0/result.json", "{}"),
        ("none/seed0/result.json", '{"profile": [], "evaluations": [], "decoding": []}'),
        ("none/seed0/result.json", GOOD_RESULT.replace("[2.5, 2.0]", "[2.5]")),
        ("none/seed0/result.json", GOOD_RESULT.replace('"2": 2.0', '"3": 2.0')),
        ("none/seed0/result.json", GOOD_RESULT.replace('"speedup"', '"slowdown"')),
        ("none/seed0/result.json", GOOD_RESULT[:-9]),
    ],
)
def test_a_damaged_file_of_results_is_named(file, content, small_run, tmp_path):
    good = {"step_times.json": '{"none": 1.5}', "none/seed0/result.json": GOOD_RESULT}
    (tmp_path / "none" / "seed0").mkdir(parents=True)
    for name, text in good.items():
        (tmp_path / name).write_text(text)
    assert [o.step_time for o in outcomes(tmp_path, 2)] == [1.5]
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=f"{file} (is damaged .*; remove it|is not JSON|must hold a JSON object)"):
        outcomes(tmp_path, 2)


def test_damaged_step_times_are_refused_before_training(small_run, tmp_path):
    (tmp_path / "step_times.json").write_text('{"none": 0}')
    with pytest.raises(UserError, match=r"step_times\.json is damaged .*0 is not a number of seconds.*; remove it"):
        ablate(small_run, tmp_path, ["none"])
    assert [path.name for path in tmp_path.iterdir()] == ["step_times.json"]


@pytest.mark.slow
def test_runs_are_trained_compared_and_not_repeated(small_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "_NUM_SPECULATIONS", (2,))
    ablate(small_run, tmp_path, ["focused-skipping"])
    printed = capsys.readouterr().out
    assert "focused-skipping" in printed.split("Recipes, held-out text")[1]
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "focused-skipping" / "seed0" / "result.json").read_text())
    assert len(result["profile"]["loss"]) == 2
    assert [row["step"] for row in result["evaluations"]] == [2, 4]
    assert all(setting["matches_autoregressive"] for setting in result["decoding"])
    config = json.loads((tmp_path / "focused-skipping" / "seed0" / "config.json").read_text())
    assert config["layerskip"]["exit_last"] == 1
    found = outcomes(tmp_path, 2)
    assert [o.recipe.name for o in found] == [BASELINE, "focused-skipping"]
    assert all(o.step_time > 0 for o in found)

    ablate(small_run, tmp_path, ["focused-skipping"])  # everything is there
    again = capsys.readouterr().out
    assert again.count("done before") == 2
    assert "step 4/4" not in again
    assert "timing" not in again
