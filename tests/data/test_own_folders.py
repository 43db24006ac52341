"""A corpus that contains workdirs of runs: what lsjax wrote itself never becomes text, whoever reads the corpus."""

import dataclasses
import json
import shutil

import pytest

import lsjax
from lsjax.data import corpus
from lsjax.data.packed import read_manifest
from lsjax.data.prepare import Shard, prepare, prepare_shard
from lsjax.errors import UserError
from tests.helpers.corpora import read_texts
from tests.helpers.runs import replace

pytestmark = pytest.mark.usefixtures("compilation_cache")


def silent(text): ...


@pytest.fixture
def texts(text_folder, tmp_path):
    """A folder of text that may be written to, in which other programs have files of the same names."""
    folder = shutil.copytree(text_folder, tmp_path / "texts")
    (folder / "site").mkdir()
    for name in ("config.json", "manifest.json", "request.json", "step_times.json"):
        (folder / "site" / name).write_text(json.dumps({"request": {"name": name}, "training": "a text"}))
    return folder


@pytest.fixture
def config(tiny_run, texts):
    return replace(tiny_run, data={"corpus": str(texts)}, training={"total_steps": 2})


def records(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".arrayrecord"}


def test_runs_and_packed_data_in_a_corpus_are_left_out(config, texts, tmp_path):
    prepare(config, tmp_path / "before", silent)
    plain = records(tmp_path / "before")
    lsjax.train(config, texts / "runs" / "x", verbose=False)
    assert records(texts / "runs" / "x" / "data") == plain
    shutil.move(texts / "runs" / "x" / "data", texts / "packed")
    notes = []
    prepare(config, texts / "runs" / "y" / "data", notes.append)
    assert records(texts / "runs" / "y" / "data") == plain
    assert any("runs/x (a training workdir)" in note and "packed (packed data)" in note for note in notes)
    skipped = read_manifest(texts / "runs" / "y" / "data")["skipped"]
    assert skipped["files"] == {"a training workdir": 1, "packed data": 1}


def test_an_ablation_in_a_corpus_is_left_out_with_its_step_times(config, texts):
    ablation, notes = texts / "ablation", []
    prepare(config, ablation / "data", silent)
    (ablation / "none").mkdir()
    (ablation / "step_times.json").write_text('{"none": 0.5}')
    _, manifest = prepare(config, texts / "again", notes.append)
    assert manifest["skipped"]["files"] == {"an ablation": 1}
    assert records(texts / "again") == records(ablation / "data")
    assert any("ablation (an ablation)" in note for note in notes)


def test_several_sources_and_validation_leave_runs_out_alike(config, texts, tmp_path):
    lsjax.train(config, texts / "runs" / "x", verbose=False)
    other = shutil.copytree(texts / "runs", tmp_path / "held_out" / "runs").parent
    (other / "own.txt").write_text("held-out words " * 50)
    mixed = replace(config, data={"corpus": "", "mixture": f"code={texts}:1", "validation": str(other)})
    _, manifest = prepare(mixed, tmp_path / "data", silent)
    assert manifest["splits"]["held_out"]["documents"] == 1
    assert manifest["splits"]["train-code"]["documents"] == len(read_texts(config.data)[0]) == 16
    assert manifest["skipped"]["files"] == {"a training workdir": 2}


def test_shards_and_a_killed_preparation_inside_their_corpus_go_on(config, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 100_000)
    prepare(config, tmp_path / "whole", silent)
    inside = texts / "run" / "data"
    assert not prepare_shard(config, inside, Shard(1, 2), silent)
    assert prepare_shard(config, inside, Shard(2, 2), silent)
    assert {path.name: path.read_bytes() for path in inside.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()
    }


def test_a_corpus_that_is_a_workdir_is_refused(config, tmp_path):
    lsjax.train(config, tmp_path / "run", verbose=False)
    for folder, kind in ((tmp_path / "run", "a training workdir"), (tmp_path / "run" / "data", "packed data")):
        for key in ("corpus", "validation"):
            odd = dataclasses.replace(config, data=dataclasses.replace(config.data, **{key: str(folder)}))
            with pytest.raises(UserError, match=rf"config\.data\.{key}.* is {kind} of lsjax"):
                prepare(odd, tmp_path / "new", silent)
