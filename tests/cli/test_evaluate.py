"""`lsjax evaluate`: its rows are what `lsjax.generate` and the scores give; it resumes, and it refuses what differs."""

import json
import statistics
from pathlib import Path

import pytest

import lsjax
from lsjax.benchmarks import quality
from lsjax.decoding.results import GenerateResult
from lsjax.experiments import evaluation
from lsjax.reports.evaluation import chosen_strategy
from lsjax.tuning.cost_model import Setting, Tuning
from tests.helpers.evaluations import MODEL, NEW_TOKENS, PROMPTS, row_of
from tests.helpers.evaluations import run_evaluate as run

DATA = Path(__file__).parent.parent / "evaluation" / "data"
STRATEGIES = {
    "autoregressive": lsjax.Autoregressive(),
    "early_exit:1": lsjax.EarlyExit(1),
    "self_speculative:1:3": lsjax.SelfSpeculative(1, 3),
}


@pytest.fixture(scope="module")
def texts():
    """Returns the results of `generate` for each strategy, prompt by prompt."""
    model = lsjax.load(MODEL)
    found = {}
    for name, strategy in STRATEGIES.items():
        alone = [lsjax.generate(model, prompt, NEW_TOKENS, strategy) for prompt in PROMPTS]
        found[name] = GenerateResult(*([lists[0] for lists in field] for field in zip(*alone, strict=True)))
    return found


@pytest.fixture(scope="module")
def custom(texts, tmp_path_factory):
    """A file whose references are the texts of the model for the first two prompts, and others for the rest."""
    path = tmp_path_factory.mktemp("custom") / "mine.jsonl"
    references = [*texts["autoregressive"].text[:2], "no", "no"]
    pairs = zip(PROMPTS, references, strict=True)
    path.write_text("".join(json.dumps({"prompt": p, "reference": r}) + "\n" for p, r in pairs))
    return path


@pytest.fixture(scope="module")
def report_of_all(custom, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.json"
    out, _ = run(f"--tasks=custom:{custom}", f"--strategies={','.join(STRATEGIES)}", f"--report={path}")
    return json.loads(path.read_text()), out


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_row_is_what_generate_gives(report_of_all, texts, custom, name):
    report, _ = report_of_all
    assert [row["strategy"] for row in report["rows"]] == list(STRATEGIES)
    row = row_of(report, f"custom:{custom}", name)
    expected, full = texts[name], texts["autoregressive"]
    assert [record["text"] for record in row["records"]] == expected.text
    assert [record["tokens"] for record in row["records"]] == expected.tokens
    right = [text == full.text[index] and index < 2 for index, text in enumerate(expected.text)]
    assert row["metrics"]["exact_match"]["value"] == sum(right) / 4
    same = [mine == theirs for mine, theirs in zip(expected.tokens, full.tokens, strict=True)]
    assert row["same_texts"]["value"] == sum(same) / 4
    drafted, accepted = (sum(stats[key] for stats in expected.stats) for key in ("drafted", "accepted"))
    assert (row["acceptance_rate"] or {}).get("value") == (accepted / drafted if drafted else None)


def test_speeds_are_medians_against_autoregressive(report_of_all, custom):
    report, _ = report_of_all
    first, *others = report["rows"]
    assert first["speedup"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    for row in others:
        pairs = list(zip(first["records"], row["records"], strict=True))
        speedup = statistics.median(theirs["ms_per_token"] / mine["ms_per_token"] for theirs, mine in pairs)
        assert row["speedup"]["value"] == pytest.approx(speedup)
        assert row["speedup"]["low"] <= speedup <= row["speedup"]["high"]
        speed = statistics.median(record["tokens_per_second"] for record in row["records"])
        assert row["tokens_per_second"]["value"] == pytest.approx(speed)


def test_the_early_exit_row_differs_so_that_equal_rows_mean_something(report_of_all):
    report, out = report_of_all
    assert report["rows"][1]["same_texts"]["value"] < 1
    assert report["rows"][2]["same_texts"]["value"] == 1
    for word in ("custom:", "early_exit:1", "self_speculative:1:3", "exact_match", "100%", "speed-up", "same text"):
        assert word in out


def test_a_batch_gives_the_same_texts(report_of_all, custom, tmp_path):
    path = tmp_path / "report.json"
    run(f"--tasks=custom:{custom}", "--batch_size=3", f"--report={path}")
    (row,) = json.loads(path.read_text())["rows"]
    assert [record["tokens"] for record in row["records"]] == [
        record["tokens"] for record in report_of_all[0]["rows"][0]["records"]
    ]


def test_other_settings_and_other_examples_are_refused(custom, tmp_path):
    path = tmp_path / "report.json"
    run(f"--tasks=custom:{custom}", "--num_examples=2", f"--report={path}")
    _, err = run(f"--tasks=custom:{custom}", "--num_examples=2", f"--report={path}", "--batch_size=2", status=2)
    assert "holds an evaluation with batch_size 1, and this one has 2: use the same settings, or another file" in err
    assert err.count("\n") == 1
    lines = custom.read_text().replace('"no"', '"yes"')
    other = tmp_path / "mine.jsonl"
    other.write_text(lines)
    run(f"--tasks=custom:{other}", f"--report={path}", "--num_examples=2")
    other.write_text(lines.replace("the cat", "the dog").replace("it is", "is it"))
    _, err = run(f"--tasks=custom:{other}", f"--report={path}", "--num_examples=2", status=2)
    assert "with other examples: its files have changed; give another file" in err


def test_the_seed_chooses_the_examples(custom, tmp_path):
    chosen = []
    for seed in (0, 0, 1, 2):
        path = tmp_path / f"{len(chosen)}.json"
        run(f"--tasks=custom:{custom}", "--num_examples=2", f"--seed={seed}", f"--report={path}")
        chosen.append([record["name"] for record in json.loads(path.read_text())["rows"][0]["records"]])
    assert chosen[0] == chosen[1]
    assert len({tuple(names) for names in chosen}) > 1
    assert all(names == sorted(names) for names in chosen)


def test_a_self_speculative_text_that_is_not_exact_ends_the_command(custom, tmp_path, monkeypatch):
    decode = quality.StrategyDecoder.decode

    def falsify(self, index):
        result = decode(self, index)
        if self.strategy.name == "self_speculative" and index == 2:
            result.tokens[0][4] += 1
        return result

    monkeypatch.setattr(quality.StrategyDecoder, "decode", falsify)
    path = tmp_path / "report.json"
    arguments = [f"--tasks=custom:{custom}", "--strategies=self_speculative:1:3", f"--report={path}"]
    _, err = run(*arguments, status=1)
    assert err.splitlines()[-1].startswith(
        f"lsjax evaluate: custom:{custom}, example 3: self-speculation in float32 is not exact: its new token 5 is not"
    )
    assert not path.exists()


def test_int8_and_bfloat16_need_not_be_exact():
    model = lsjax.load(MODEL)
    drafting = lsjax.SelfSpeculative(1, 3)
    assert quality.must_be_exact(model, drafting)
    assert not quality.must_be_exact(model, lsjax.EarlyExit(1))
    assert not quality.must_be_exact(lsjax.quantize(model), drafting)
    assert not quality.must_be_exact(lsjax.load(MODEL, cache="int8"), drafting)


@pytest.mark.parametrize(
    "strategy",
    [lsjax.SelfSpeculative(1, 3, w, draft_vocabulary=k) for w in (None, "int8") for k in (None, 8)],
    ids=str,
)
def test_a_row_names_its_strategy_as_the_flag_does(strategy):
    name = chosen_strategy(quality.row_settings("task", strategy, 1))
    assert evaluation.parse_strategy(name, 3) == strategy


@pytest.mark.parametrize(("speedup", "chosen"), [(1.5, "self_speculative:1:3"), (0.9, "autoregressive")])
def test_auto_decodes_with_the_setting_that_is_predicted_to_be_the_fastest(
    custom, tmp_path, monkeypatch, speedup, chosen
):
    tuning = Tuning((Setting(1, 3, 2.0, 1.0, speedup),), milliseconds_per_token=1.0)
    monkeypatch.setattr(evaluation, "measure_settings", lambda *arguments: tuning)
    path = tmp_path / "report.json"
    out, _ = run(f"--tasks=custom:{custom}", "--strategies=auto", "--num_examples=2", f"--report={path}")
    auto = row_of(json.loads(path.read_text()), f"custom:{custom}", "auto")
    assert auto["same_texts"]["value"] == 1
    assert (auto["acceptance_rate"] is None) == (chosen == "autoregressive")
    assert f"auto ({chosen})" in out


def test_held_out_text_has_bits_per_byte_and_no_speed(tmp_path):
    text, path = tmp_path / "text.txt", tmp_path / "report.json"
    text.write_text("the cat sat on the mat, and it is there. " * 20)
    strategies = "--strategies=early_exit:1,self_speculative:1:3"
    run(f"--tasks=held_out_text:{text}", strategies, "--num_examples=2", f"--report={path}")
    rows = json.loads(path.read_text())["rows"]
    bits = {row["strategy"]: row["metrics"]["bits_per_byte"]["value"] for row in rows}
    assert bits["self_speculative:1:3"] == bits["autoregressive"] != bits["early_exit:1"]
    records = rows[0]["records"]
    assert len(records) == 2
    total_bytes = sum(record["bytes"] for record in records)
    assert bits["autoregressive"] == pytest.approx(sum(record["bits"] for record in records) / total_bytes)
    assert rows[0]["speedup"] is None


def test_human_eval_runs_code_when_allowed(tmp_path):
    path = tmp_path / "report.json"
    run(f"--tasks=human_eval:{DATA}/human_eval.jsonl", "--allow_code_execution", f"--report={path}")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["metrics"] == {"pass@1": {"value": 0.0, "low": 0.0, "high": 0.0}}
    assert [record["name"] for record in row["records"]] == ["Own/0", "Own/1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks="], "--tasks is empty"),
        (["--tasks=magic"], "'magic' is not one of human_eval"),
        (["--tasks=docstrings"], "no example fits into the model's context of 128 tokens with 120 new ones"),
        (
            ["--tasks=custom:{custom}", "--strategies=early_exit"],
            "'early_exit' is none of autoregressive",
        ),
        (["--tasks=custom:{custom}", "--strategies=early_exit:4"], "exit_layer 4 is out of range"),
        (
            ["--tasks=custom:{custom}", "--strategies=self_speculative:1:2:3:4"],
            "E:d[:k][:int8] or auto",
        ),
        (["--tasks=custom:{custom}", "--strategies=self_speculative:1:2:0"], "draft_vocabulary must be at least 1"),
        (["--tasks=custom:{custom}", "--strategies=early_exit:1:int8"], "'early_exit:1:int8' is none of"),
        (["--tasks=custom:{custom}", "--strategies=self_speculative:1:x"], "where E, d and k are numbers"),
        (["--tasks=custom:{custom}", "--num_shots=1"], "--num_shots has no effect here"),
        (["--tasks=custom:{custom}", "--allow_code_execution"], "--allow_code_execution has no effect here"),
        (["--tasks=custom:{tmp}/no.jsonl"], "no.jsonl"),
        (["--tasks=custom:{custom}", "--report={tmp}/no/report.json"], "its folder does not exist"),
        (["--tasks=custom:{custom}", "--report={tmp}/other.json"], "is no report of lsjax evaluate"),
        (["--tasks=custom:{custom}", "--num_examples=0"], "--num_examples"),
    ],
)
def test_bad_input_is_one_line(tmp_path, custom, arguments, message):
    (tmp_path / "other.json").write_text("{}")
    arguments = [argument.format(custom=custom, tmp=tmp_path) for argument in arguments]
    out, err = run("--max_new_tokens=120", *arguments, status=2)
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]
