"""The benchmark of a training step: what it feeds to all, and what it makes of the times."""

import statistics

import numpy as np

from lsjax.evaluation.tables import training_table
from lsjax.training.benchmark import benchmark_training, random_batch
from tests.training.test_step import replace


def test_rows_hold_documents_that_start_anew(tiny_run):
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
    seen, order = [], []

    def rival(turn):
        seen.append(turn)
        order.append("a")
        return 4.0

    def other(turn):
        order.append("b")
        return 4.0

    config = replace(tiny_run, layerskip={"dropout_granularity": "batch", "dropout_max_rate": 0.5})
    report = benchmark_training(config, 3, 2, lambda params: {"a": rival, "b": other})
    ours, a, b = report["runs"]
    assert [ours["name"], a["name"], b["name"]] == ["lsjax", "a", "b"]
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b", "a", "b"]  # ours first, second, last, first, second
    assert [np.flatnonzero(turn.recipe.exit_active).tolist() for turn in seen[:3]] == [[0, 3], [1, 3], [2, 3]]
    assert all(turn.layer_mask.shape == (4,) for turn in seen)
    assert len({turn.batch.tokens.tobytes() for turn in seen}) == 5
    np.testing.assert_allclose([turn.learning_rate for turn in seen[:2]], [0.5e-3, 1e-3], rtol=1e-6)
    assert len(ours["losses"]) == 5
    assert abs(ours["losses"][0] - np.log(320)) < 0.1  # fresh parameters know nothing
    for run in (ours, a, b):
        assert len(run["seconds"]) == 3
        assert run["ms_per_step"] == 1e3 * statistics.median(run["seconds"])
        assert run["tokens_per_second"] == 8 * 32 / statistics.median(run["seconds"])
    assert a["times_ours"] == sorted(t / o for t, o in zip(a["seconds"], ours["seconds"], strict=True))[1]
    assert len(training_table(report).rows) == 3
