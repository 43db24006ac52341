"""The exit profile against float64 numpy, and the tables and figures made from it."""

import jax
import numpy as np
import pytest

from lsjax.evaluation.exits import ExitProfile, exit_profile
from lsjax.parallel.sharding import make_mesh
from lsjax.reports.figures import draw_before_and_after, draw_comparison
from lsjax.reports.tables import comparison_table, decoding_table, print_table
from tests.helpers import numpy_llama
from tests.helpers.batches import weighted_batch


@pytest.fixture(scope="module")
def batch():
    return weighted_batch()


def test_profile_equals_numpy(tiny, tiny_params, batch):
    profile = exit_profile(tiny_params, [batch, batch], tiny)
    loss, right, agree, count = np.zeros(4), np.zeros(4), np.zeros(4), 0
    for row in range(2):
        states = numpy_llama.hidden_states(tiny_params, batch.tokens[row], tiny)
        logits = numpy_llama.logits(tiny_params, states, tiny)
        for s in np.flatnonzero(batch.weights[row]):
            count += 1
            for layer in range(4):
                target = batch.targets[row, s]
                loss[layer] += numpy_llama.cross_entropy(logits[layer, s], target)
                right[layer] += logits[layer, s].argmax() == target
                agree[layer] += logits[layer, s].argmax() == logits[-1, s].argmax()
    np.testing.assert_allclose(profile.loss, loss / count, rtol=1e-4)
    np.testing.assert_allclose(profile.accuracy, right / count)
    np.testing.assert_allclose(profile.agreement, agree / count)


def test_some_exits_are_those_of_all(tiny, tiny_params, batch):
    """Checks that a stride leaves out exits but never the last one, and changes no number of the others."""
    every = exit_profile(tiny_params, [batch], tiny)
    for stride, exits in ((2, [2, 4]), (3, [3, 4]), (9, [4])):
        some = exit_profile(tiny_params, [batch], tiny, stride)
        assert some.exit_layers.tolist() == exits
        for layer in exits:
            np.testing.assert_allclose(some.at(layer), every.at(layer), rtol=1e-6)


def test_tables_and_picture_hold_the_numbers(tmp_path, capsys):
    profile = ExitProfile(np.array([2, 4]), np.array([3.5, 2.25]), np.array([0.1, 0.4]), np.array([0.6, 1.0]))
    run = {
        "strategy": "self_speculative", "exit_layer": 1, "num_speculations": 4, "draft_weights": "int8", "lookup": 0,
        "batch_size": 1, "new_tokens": 64, "seconds": 1.0, "ms_per_token": 15.6, "tokens_per_second": 64.1,
        "time_to_first_token_ms": 9.0,
        "acceptance_rate": 0.81, "tokens_per_round": 4.2, "speedup": 1.77, "matches_autoregressive": True,
    }  # fmt: skip
    report = {
        "device": "cpu",
        "weights": "bfloat16",
        "runs": [run, run | {"num_speculations": 6, "acceptance_rate": None}],
    }
    print_table(decoding_table(report))
    printed = capsys.readouterr().out
    for text in ("self_speculative, int8 drafts", "weights in bfloat16", "1.77", "81%", "4.20"):
        assert text in printed
    better = profile._replace(loss=profile.loss / 3)
    print_table(comparison_table({"before": profile, "after": better}))
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert ["│", "4", "│", "2.25", "│", "0.75", "│", "100.0%", "│", "100.0%", "│"] in rows
    draw_comparison(tmp_path / "both.png", {"before": profile, "after": better})
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    trees = [{"profile": each._asdict(), "decoding": {"greedy": report, "T=0.8": report}} for each in (profile, better)]
    draw_before_and_after(tmp_path / "demo.png", *trees, "a title")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both.png", "demo.png"]


def test_profile_is_the_same_over_eight_devices(tiny, tiny_params, batch):
    from lsjax.config import MeshConfig
    from lsjax.data.batch import Batch
    from lsjax.parallel.sharding import batch_sharding
    from lsjax.training.loop import put_batch

    eight = Batch(*(np.tile(column, (4, 1)) for column in batch))
    alone = exit_profile(tiny_params, [eight], tiny)
    mesh = make_mesh(MeshConfig(2, 4, 1))
    with jax.set_mesh(mesh):
        spread = exit_profile(tiny_params, [put_batch(eight, np.arange(8), 8, batch_sharding(mesh))], tiny)
    for ours, theirs in zip(spread, alone, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
