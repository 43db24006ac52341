"""`lsjax evaluate` lets its strategies take turns: in what order, against what speed-ups compare, how it resumes."""

import json
import statistics

import pytest

from lsjax.benchmarks import quality
from lsjax.experiments import evaluation, evaluation_report
from lsjax.tuning.cost_model import Setting, Tuning
from tests.helpers.evaluations import PROMPTS, row_of, run_evaluate

AR, EXIT, DRAFTS = "autoregressive", "early_exit", "self_speculative"
STRATEGIES = "--strategies=early_exit:1,self_speculative:1:3"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = tmp_path_factory.mktemp("custom") / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "reference": "no"}) + "\n" for prompt in PROMPTS))
    return f"custom:{path}"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "report.json"


class Log:
    """Notes what the decoders do: "compiled", or (strategy, batch) for each batch that counts. Warm-ups are not in it.

    results: of those batches. change: called with (number of the call, strategy, result) before a result is used.
    """

    def __init__(self, monkeypatch):
        self.calls, self.results, self.change = [], [], lambda number, strategy, result: None
        compile_one, decode = quality.StrategyDecoder.compile, quality.StrategyDecoder.decode
        self._warming = False

        def compile_and_note(decoder):
            self._warming = True
            seconds = compile_one(decoder)
            self._warming = False
            self.calls.append("compiled")
            return seconds

        def decode_and_note(decoder, index):
            result = decode(decoder, index)
            if not self._warming:
                self.change(len(self.results), decoder.strategy.name, result)
                self.calls.append((decoder.strategy.name, index))
                self.results.append(result)
            return result

        monkeypatch.setattr(quality.StrategyDecoder, "compile", compile_and_note)
        monkeypatch.setattr(quality.StrategyDecoder, "decode", decode_and_note)

    def clear(self):
        self.calls.clear()
        self.results.clear()


@pytest.fixture
def log(monkeypatch):
    return Log(monkeypatch)


def interrupt_at(log, call):
    """Ends the evaluation as Ctrl-C would, when the batch of that number has just been decoded."""

    def change(number, strategy, result):
        if number == call:
            raise KeyboardInterrupt

    log.change = change


def test_every_strategy_decodes_a_batch_before_the_next_begins(task, path, log):
    run_evaluate(f"--tasks={task}", STRATEGIES, f"--report={path}")
    turns = [(AR, 0), (EXIT, 0), (DRAFTS, 0), (EXIT, 1), (DRAFTS, 1), (AR, 1)]
    turns += [(DRAFTS, 2), (AR, 2), (EXIT, 2), (AR, 3), (EXIT, 3), (DRAFTS, 3)]
    assert log.calls == ["compiled"] * 3 + turns
    report = json.loads(path.read_text())
    assert [row["strategy"] for row in report["rows"]] == [AR, "early_exit:1", "self_speculative:1:3"]
    assert report["unfinished"] == []


def test_who_decodes_a_batch():
    """Counted by hand: autoregressive decoding has three batches of four, a second strategy one, a third all."""
    counts = {AR: 3, "b": 1, "c": 4}
    assert quality.turns_of_batches(counts, 4) == [[], ["b", AR], [AR, "b"], ["b", AR]]
    assert quality.turns_of_batches({AR: 2}, 2) == [[], []]


def test_a_machine_that_gets_quiet_changes_no_speedup(task, path, log):
    """Times are 10, 4 and 5 ms per token, and three times that in the first half of the calls."""

    def change(number, strategy, result):
        load = 3 if number < 6 else 1
        milliseconds = load * {AR: 10, EXIT: 4, DRAFTS: 5}[strategy]
        for stats in result.stats:
            stats.update(ms_per_token=milliseconds, tokens_per_second=1e3 / milliseconds)

    log.change = change
    run_evaluate(f"--tasks={task}", STRATEGIES, f"--report={path}")
    rows = json.loads(path.read_text())["rows"]
    assert [row["speedup"]["value"] for row in rows] == [1, 2.5, 2]
    assert [row["speedup"]["low"] for row in rows] == [1, 2.5, 2]


def test_a_speedup_is_a_median_over_batches(task, path):
    run_evaluate(f"--tasks={task}", "--strategies=early_exit:1", "--batch_size=3", f"--report={path}")
    report = json.loads(path.read_text())
    full, early = row_of(report, task, AR)["records"], row_of(report, task, "early_exit:1")
    pairs = [(full[place]["ms_per_token"], early["records"][place]["ms_per_token"]) for place in (0, 3)]
    assert early["speedup"]["value"] == pytest.approx(statistics.median(theirs / ours for theirs, ours in pairs))
    speeds = [1e3 / ours for _, ours in pairs]
    assert early["tokens_per_second"]["value"] == pytest.approx(statistics.median(speeds))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_interrupted_evaluation_goes_on(task, path, log, monkeypatch, batch_size):
    monkeypatch.setattr(evaluation_report, "_SECONDS_BETWEEN_WRITES", 0)
    arguments = [f"--tasks={task}", f"--batch_size={batch_size}", f"--report={path}"]
    interrupt_at(log, 4)  # the second batch of the second strategy in turn
    run_evaluate(*arguments, STRATEGIES, status=130)
    before = json.loads(path.read_text())
    assert before["rows"] == []
    assert [len(row["records"]) for row in before["unfinished"]] == [batch_size] * 3
    log.clear()
    interrupt_at(log, None)
    out, _ = run_evaluate(*arguments, STRATEGIES)
    assert (EXIT, 0) not in log.calls
    assert log.calls[3:6] == [(EXIT, 1), (DRAFTS, 1), (AR, 1)]
    after = json.loads(path.read_text())
    assert after["unfinished"] == []
    for old, row in zip(before["unfinished"], after["rows"], strict=True):
        assert row["records"][:batch_size] == old["records"]
        assert [record["name"] for record in row["records"]] == ["1", "2", "3", "4"]
        assert row["seconds"] > old["seconds"]
    log.clear()
    again, err = run_evaluate(*arguments, STRATEGIES)
    assert (again, log.calls) == (out, [])
    assert err.count("in the report already") == 3


def test_an_evaluation_that_ends_before_its_last_rows_decodes_nothing_again(task, path, log, monkeypatch):
    arguments = [f"--tasks={task}", "--batch_size=3", f"--report={path}", STRATEGIES]

    def end(report, rows):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluation_report, "_SECONDS_BETWEEN_WRITES", 0)
        patch.setattr(evaluation_report.Report, "add", end)
        run_evaluate(*arguments, status=130)
    log.clear()
    run_evaluate(*arguments)
    assert log.calls == []
    report = json.loads(path.read_text())
    assert [len(row["records"]) for row in report["rows"]] == [4] * 3
    assert report["unfinished"] == []


def test_another_strategy_takes_the_place_of_an_interrupted_one(task, path, log, monkeypatch):
    monkeypatch.setattr(evaluation_report, "_SECONDS_BETWEEN_WRITES", 0)
    arguments = [f"--tasks={task}", f"--report={path}"]
    interrupt_at(log, 4)  # after two batches of two strategies
    run_evaluate(*arguments, "--strategies=early_exit:1", status=130)
    log.clear()
    interrupt_at(log, None)
    run_evaluate(*arguments, "--strategies=self_speculative:1:3")
    assert log.calls[2:] == [(strategy, index) for index in (0, 1, 2, 3) for strategy in _turn(index, AR, DRAFTS)]
    report = json.loads(path.read_text())
    assert [len(row["records"]) for row in report["unfinished"]] == [2]
    log.clear()
    run_evaluate(*arguments, "--strategies=early_exit:1")
    assert log.calls[2:] == [(strategy, index) for index in (2, 3) for strategy in _turn(index, AR, EXIT)]
    assert len(json.loads(path.read_text())["rows"]) == 3


def _turn(index, first, second):
    return (second, first) if index % 2 else (first, second)


def test_a_strategy_that_joins_is_timed_beside_autoregressive_decoding(task, path, log):
    arguments = [f"--tasks={task}", f"--report={path}"]
    run_evaluate(*arguments)
    (first,) = json.loads(path.read_text())["rows"]
    log.clear()

    def change(number, strategy, result):
        for stats in result.stats:
            stats.update(ms_per_token={AR: 1e6, EXIT: 5e5}[strategy], tokens_per_second=1)

    log.change = change
    _, err = run_evaluate(*arguments, "--strategies=early_exit:1")
    assert f"{task}: autoregressive decoding runs again, because speed-ups compare with it" in err
    assert log.calls[2:] == [(strategy, index) for index in range(4) for strategy in _turn(index, AR, EXIT)]
    same, joined = json.loads(path.read_text())["rows"]
    assert same == first
    assert joined["speedup"] == {"value": 2, "low": 2, "high": 2}
    assert [record["autoregressive_ms_per_token"] for record in joined["records"]] == [1e6] * 4


def test_nothing_joins_a_report_with_other_autoregressive_texts(task, path):
    arguments = [f"--tasks={task}", f"--report={path}"]
    run_evaluate(*arguments)
    report = json.loads(path.read_text())
    report["rows"][0]["records"][2]["tokens"][5] += 1
    path.write_text(json.dumps(report))
    _, err = run_evaluate(*arguments, "--strategies=early_exit:1", status=2)
    assert f"{task}, example 3: autoregressive decoding gives another text than the one in the report" in err
    assert json.loads(path.read_text()) == report


def test_auto_keeps_its_choice(task, path, log, monkeypatch):
    monkeypatch.setattr(evaluation_report, "_SECONDS_BETWEEN_WRITES", 0)
    choices = [Tuning((Setting(1, drafts, 2.0, 1.0, 1.5),), milliseconds_per_token=1.0) for drafts in (3, 2)]
    monkeypatch.setattr(evaluation, "measure_settings", lambda *arguments: choices.pop(0))
    arguments = [f"--tasks={task}", f"--report={path}", "--strategies=auto"]
    interrupt_at(log, 3)
    run_evaluate(*arguments, status=130)
    interrupt_at(log, None)
    out, _ = run_evaluate(*arguments)
    assert "auto (self_speculative:1:3)" in out
    assert len(choices) == 1


def test_a_report_of_the_earlier_format_is_refused(task, path):
    path.write_text(json.dumps({"format": "lsjax evaluation 1", "settings": {}, "rows": []}))
    _, err = run_evaluate(f"--tasks={task}", f"--report={path}", status=2)
    assert "is of an earlier version, which timed the strategies one after another: give another file" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda row: row.pop("records"),
        lambda row: row.update(records=row["records"][1:]),
        lambda row: row["records"][0].pop("ms_per_token"),
        lambda row: row["records"][0].update(scores=None),
        lambda row: row.update(seconds=None),
    ],
)
def test_damaged_records_are_one_line(task, path, damage):
    arguments = [f"--tasks={task}", f"--report={path}"]
    run_evaluate(*arguments)
    report = json.loads(path.read_text())
    damage(report["rows"][0])
    path.write_text(json.dumps(report))
    _, err = run_evaluate(*arguments, "--strategies=early_exit:1", status=2)
    assert f"{path} is damaged" in err
    assert "Traceback" not in err
