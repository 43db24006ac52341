"""The benchmark of a training step feeds the same inputs to all, takes medians, and shows progress."""

import itertools
import statistics
import types

import numpy as np

from lsjax.benchmarks import training
from lsjax.benchmarks.training import benchmark_training, random_batch
from lsjax.reports.tables import training_table
from tests.helpers.runs import replace


def test_sequences_hold_documents_that_start_anew(tiny_run):
    batch = random_batch(tiny_run, 3)
    assert batch.tokens.shape == (8, 32)
    np.testing.assert_array_equal(batch.targets[:, :-1], batch.tokens[:, 1:])
    for ids, positions in zip(batch.segment_ids, batch.positions, strict=True):
        assert set(np.diff(ids)) <= {0, 1, 2}
        expected = [s - list(ids).index(number) for s, number in enumerate(ids)]
        assert positions.tolist() == expected
    assert len({len(set(ids)) for ids in batch.segment_ids}) > 1 or batch.segment_ids.max() == 2
    assert random_batch(replace(tiny_run, data={"separate_documents": False}), 3).segment_ids is None


def test_all_take_each_step_in_turns_and_times_are_medians(tiny_run):
    seen, order, notes = [], [], []

    def first(inputs):
        seen.append(inputs)
        order.append("a")
        return 4.0

    def second(inputs):
        order.append("b")
        return 4.0

    config = replace(tiny_run, layerskip={"dropout_granularity": "batch", "dropout_max_rate": 0.5})
    report = benchmark_training(config, 3, 2, baselines=lambda params: {"a": first, "b": second}, note=notes.append)
    ours, a, b = report["runs"]
    assert [ours["name"], a["name"], b["name"]] == ["lsjax", "a", "b"]
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b", "a", "b"]  # ours first, second, last, first, second
    assert [np.flatnonzero(inputs.recipe.exit_active).tolist() for inputs in seen[:3]] == [[0, 3], [1, 3], [2, 3]]
    assert all(inputs.layer_mask.shape == (4,) for inputs in seen)
    assert len({inputs.batch.tokens.tobytes() for inputs in seen}) == 5
    np.testing.assert_allclose([inputs.learning_rate for inputs in seen[:2]], [0.5e-3, 1e-3], rtol=1e-6)
    assert len(ours["losses"]) == 5
    assert abs(ours["losses"][0] - np.log(320)) < 0.1  # fresh parameters know nothing
    for run in (ours, a, b):
        assert len(run["seconds"]) == 3
        assert run["ms_per_step"] == 1e3 * statistics.median(run["seconds"])
        assert run["tokens_per_second"] == 8 * 32 / statistics.median(run["seconds"])
    assert a["times_ours"] == sorted(t / o for t, o in zip(a["seconds"], ours["seconds"], strict=True))[1]
    assert len(training_table(report).rows) == 3
    assert notes[:3] == [f"compiling and running the first step of {name}" for name in ("lsjax", "a", "b")]
    assert notes[3].startswith("warm-up step 1/5: lsjax ")
    assert notes[-1].startswith("step 5/5: lsjax ")


def test_progress_comes_every_few_seconds(monkeypatch):
    """Progress of steps of 4 seconds comes after the first step, then at least 10 seconds apart, and after the last."""
    now = itertools.count(0, 4)
    monkeypatch.setattr(training, "time", types.SimpleNamespace(monotonic=lambda: next(now)))
    notes = []
    progress = training._Progress(2, 8, notes.append)
    for number in range(10):
        progress.after(number, {"lsjax": [4.0]})
    steps = [note.split(":")[0].removeprefix("warm-up ") for note in notes]
    assert steps == ["step 1/10", "step 4/10", "step 7/10", "step 10/10"]
