"""A run on a mixture: what it logs, evaluation by source, and exact resumption."""

import json
import shutil

import jax
import numpy as np
import pytest

import lsjax
from lsjax.errors import UserError
from lsjax.io.checkpoints import finished_steps
from lsjax.training.loop import train
from tests import conftest
from tests.helpers.runs import replace

pytestmark = pytest.mark.usefixtures("compilation_cache")

MIXTURE = "first={folder}/first:3,second={folder}/second:1"


def read_lines(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if "tokens_per" not in key} for line in lines]


@pytest.fixture(scope="module")
def finished(text_folder, tmp_path_factory):
    """Returns the configuration and the workdir of a run on two halves of the text."""
    folder = tmp_path_factory.mktemp("halves")
    for number, path in enumerate(sorted(text_folder.iterdir())):
        half = folder / ("first", "second")[number % 2]
        half.mkdir(exist_ok=True)
        shutil.copy(path, half)
    config = conftest.tiny_run.__wrapped__(text_folder)
    config = replace(config, data={"mixture": MIXTURE.format(folder=folder), "held_out_fraction": 0.4})
    train(config, folder / "run", verbose=False)
    return config, folder / "run"


def test_shares_are_logged_and_sources_evaluated_by_name(finished):
    _, workdir = finished
    packed = json.loads((workdir / "data" / "manifest.json").read_text())["splits"]
    for row in read_lines(workdir / "metrics.jsonl"):
        assert row["mixture"] == {"first": 0.75, "second": 0.25}
        read = row["step"] * 8
        assert row["epochs"]["second"] == pytest.approx(read / 4 / packed["train-second"]["sequences"])
    evaluations = [(row["step"], row["set"]) for row in read_lines(workdir / "evaluations.jsonl")]
    assert evaluations == [(6, "first"), (6, "second"), (12, "first"), (12, "second")]


def test_a_run_that_lost_its_last_steps_repeats_them_exactly(finished, tmp_path, capfd):
    config, workdir = finished
    shutil.copytree(workdir, tmp_path / "run")
    for step in finished_steps(tmp_path / "run" / "checkpoints"):
        if step > 10:
            shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    train(config, tmp_path / "run")
    out = capfd.readouterr().out
    assert "resuming at step 10" in out
    assert "mixture up to step 10: first 75.00% (60 sequences, " in out
    assert "mixture up to step 12: first 75.00% (72 sequences, " in out
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert read_lines(tmp_path / "run" / name) == read_lines(workdir / name)
    ours, theirs = lsjax.load(tmp_path / "run"), lsjax.load(workdir)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)


def test_a_run_keeps_its_weights(finished):
    config, workdir = finished
    other = replace(config, data={"mixture": config.data.mixture.replace(":3", ":2")})
    with pytest.raises(UserError, match=r"holds another run: config\.data\.mixture was"):
        train(other, workdir, verbose=False)
