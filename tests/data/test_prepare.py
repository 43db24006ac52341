"""Checks that prepared bytes depend on the corpus alone: not on processes, shards, or being killed on the way."""

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lsjax.config import Config, DataConfig
from lsjax.data import corpus as corpora
from lsjax.data.pipeline import held_out_batches, training_batches
from lsjax.data.prepare import Shard, prepare, prepare_shard
from lsjax.data.progress import PrepareProgress
from lsjax.errors import UserError
from lsjax.files import write_atomically
from tests.conftest import process_environment
from tests.helpers.corpora import read_texts

BLOCK = 20_000


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(corpora, "BLOCK_BYTES", BLOCK)


@pytest.fixture(scope="module")
def lines(text_folder, tmp_path_factory):
    """Returns a JSONL file of 1,000 short documents, about 110 kB."""
    text = "".join(path.read_text() for path in sorted(text_folder.iterdir()))
    path = tmp_path_factory.mktemp("lines") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text[i : i + 100]}) + "\n" for i in range(0, 100_000, 100)))
    return path


@pytest.fixture
def run(tiny_run, lines):
    data = dataclasses.replace(tiny_run.data, corpus=str(lines), held_out_fraction=0.1)
    return dataclasses.replace(tiny_run, data=data)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def silent(text): ...


def test_processes_and_shards_do_not_change_the_bytes(run, tmp_path, small_blocks):
    prepare(run, tmp_path / "one", silent, workers=1)
    whole = content(tmp_path / "one")
    assert sum(name.endswith(".arrayrecord") for name in whole) >= 10
    prepare(run, tmp_path / "three", silent, workers=3)
    assert content(tmp_path / "three") == whole
    for index, complete in ((2, False), (3, False), (1, True)):
        assert prepare_shard(run, tmp_path / "shards", Shard(index, 3), silent, workers=1) is complete
    assert content(tmp_path / "shards") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "shards", "three"]


SLOW = """
import pickle, sys, time
from lsjax.data import corpus, packing, prepare
corpus.BLOCK_BYTES = {block}
write_part = packing.write_part
def slowly(folder, part):
    write_part(folder, part)
    time.sleep(0.5)
packing.write_part = slowly
with open(sys.argv[1], "rb") as file:
    run = pickle.load(file)
prepare.prepare(run, prepare.Path(sys.argv[2]), print, workers=1)
"""


def test_a_killed_preparation_goes_on_and_gives_the_same_bytes(run, tmp_path, small_blocks):
    prepare(run, tmp_path / "whole", silent, workers=1)
    (tmp_path / "run").write_bytes(pickle.dumps(run))
    data, partial = tmp_path / "data", tmp_path / "data.partial"
    command = [sys.executable, "-c", SLOW.format(block=BLOCK), str(tmp_path / "run"), str(data)]
    for least in (2, 4):
        process = subprocess.Popen(command, env=process_environment(), stdout=subprocess.DEVNULL)
        while len(list(partial.glob("part-*.json"))) < least:
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not data.exists()
    before = {path: path.stat().st_mtime_ns for path in partial.glob("*-000000-*.arrayrecord")}
    (partial / ".train-000009-0000.arrayrecord.0123abcd").write_bytes(b"half of a file")
    renamed = []
    real = os.replace

    def replace(source, target):
        renamed.append(str(target))
        real(source, target)

    notes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        prepare(run, data, notes.append, workers=1)
    assert before
    assert not any("000000-0000.arrayrecord" in name for name in renamed), "a finished block was packed again"
    assert content(data) == content(tmp_path / "whole")
    assert any(note.startswith("going on where an earlier preparation was") for note in notes)


def test_a_damaged_report_is_named(run, tmp_path, small_blocks):
    prepare_shard(run, tmp_path / "data", Shard(1, 2), silent, workers=1)
    report = tmp_path / "data.partial" / "part-000000-0000.json"
    whole = report.read_text()
    for damaged in ("", "{}", whole.replace('"size": ', '"size": -'), whole.replace('"file"', '"fil"')):
        report.write_text(damaged)
        with pytest.raises(UserError, match=r"part-000000-0000\.json is (damaged|not JSON)"):
            prepare_shard(run, tmp_path / "data", Shard(2, 2), silent, workers=1)
    report.write_text(whole)
    records = tmp_path / "data.partial" / "train-000000-0000.arrayrecord"
    records.write_bytes(records.read_bytes()[:100])
    with pytest.raises(UserError, match=r"train-000000-0000\.arrayrecord is damaged"):
        prepare_shard(run, tmp_path / "data", Shard(2, 2), silent, workers=1)


def test_an_unfinished_preparation_of_something_else_is_refused(run, tmp_path, small_blocks):
    prepare_shard(run, tmp_path / "data", Shard(1, 2), silent, workers=1)
    longer = dataclasses.replace(run, training=dataclasses.replace(run.training, sequence_length=64))
    with pytest.raises(UserError, match=r"data\.partial is the unfinished preparation of another configuration"):
        prepare(longer, tmp_path / "data", silent)


def test_train_refuses_a_corpus_that_is_not_small(run, tmp_path):
    with pytest.raises(
        UserError, match=r"more than the 1,000 that train prepares by itself; run `lsjax prepare` first"
    ):
        prepare(run, tmp_path / "data", silent, most_bytes=1000)
    prepare(run, tmp_path / "data", silent, workers=1)
    prepare(run, tmp_path / "data", silent, most_bytes=1000)  # it is there


def test_every_line_is_read_once_wherever_blocks_end(lines, monkeypatch):
    whole = [json.loads(line)["text"] for line in lines.read_text().splitlines()]
    size = lines.stat().st_size
    line = len(lines.read_text().splitlines()[0]) + 1
    for block in (line - 1, line, 997, size - 1, size):
        monkeypatch.setattr(corpora, "BLOCK_BYTES", block)
        assert list(read_texts(DataConfig(corpus=str(lines)))[0].values()) == [text for text in whole if text.strip()]


def test_a_bad_line_is_named_by_its_number_in_the_file(tmp_path, small_blocks):
    good = [json.dumps({"text": "x" * 100})] * 700
    (tmp_path / "a.jsonl").write_text("\n".join([*good[:500], "broken", *good[500:]]))
    with pytest.raises(UserError, match=r"a\.jsonl:501: want a JSON object"):
        read_texts(DataConfig(corpus=str(tmp_path)))


def test_a_folder_prepared_by_an_earlier_version_is_read(tiny_run, tmp_path):
    """One file per split, no list of files, no keys that came later."""
    prepare(tiny_run, tmp_path / "data", silent)
    batch = next(training_batches(tmp_path / "data", 8, 32, seed=0))
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    for split in ("train", "held_out"):
        (tmp_path / "data" / f"{split}-000000-0000.arrayrecord").rename(tmp_path / "data" / f"{split}.arrayrecord")
        del manifest["splits"][split]["padding"]
    del manifest["files"], manifest["skipped"]
    keys = {"corpus", "file_pattern", "text_key", "held_out_fraction", "tokenizer", "separate_documents"}
    keys |= {"initial_model", "vocab_size", "sequence_length"}
    manifest["request"] = {key: value for key, value in manifest["request"].items() if key in keys}
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    prepare(tiny_run, tmp_path / "data", silent)
    np.testing.assert_array_equal(next(training_batches(tmp_path / "data", 8, 32, seed=0)).tokens, batch.tokens)
    assert len(held_out_batches(tmp_path / "data", 8, 32, 2)) == 2


def test_progress_says_speed_and_time_left():
    now, notes = [0.0], []
    progress = PrepareProgress(400_000_000, notes.append, clock=lambda: now[0])
    progress.skip(100_000_000)
    now[0] = 5.0
    progress.add(50_000_000, 60_000_000)
    now[0] = 20.0
    progress.add(50_000_000, 60_000_000)
    now[0] = 60.0
    progress.close()
    assert notes == [
        "going on where an earlier preparation was: 100 of 400 MB are done",
        "prepared 200 of 400 MB, 6.0 MB/s of text, 40 s left",
        "prepared 120 MB of text in 1 min 0 s, 2.0 MB/s",
    ]


def test_validation_sets_are_packed_by_name_and_the_corpus_is_trained_on(run, text_folder, tmp_path, small_blocks):
    for name in ("web", "code"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"{name} {i} " * 9}) + "\n" for i in range(30))
        )
    sets = f"web={tmp_path}/web.jsonl,code={tmp_path}/code.jsonl"
    mine = dataclasses.replace(run, data=dataclasses.replace(run.data, validation=sets))
    tokenizer, manifest = prepare(mine, tmp_path / "data", silent, workers=1)
    assert {split: counts["documents"] for split, counts in manifest["splits"].items()} == {
        "train": 1000 - manifest["skipped"]["documents"].get("without text", 0),
        "web": 30,
        "code": 30,
    }
    for name in ("web", "code"):
        batch = held_out_batches(tmp_path / "data", 4, 32, 1, split=name)[0]
        assert tokenizer.decode(batch.tokens[0].tolist()).startswith(f"{name} 0 {name} 0")
    one = dataclasses.replace(run, data=dataclasses.replace(run.data, validation=str(text_folder)))
    assert list(prepare(one, tmp_path / "one", silent, workers=1)[1]["splits"]) == ["train", "held_out"]


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ("a=x,a=y", "NAME=PATH for each of several sets"),
        ("train=x", "each name once and not 'train'"),
        ("a=x,b", "NAME=PATH"),
        ("nothing", "config.data.validation 'nothing' is neither"),
        ("a={tmp}/empty.jsonl", "config.data.validation: a is empty"),
    ],
)
def test_wrong_validation_sets_are_named(sets, message, run, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    data = dataclasses.replace(run.data, validation=sets.format(tmp=tmp_path))
    with pytest.raises(UserError, match=message):
        prepare(dataclasses.replace(run, data=data), tmp_path / "data", silent, workers=1)


@pytest.mark.parametrize("write", [lambda path: prepare(Config(), path), lambda path: write_atomically(path, "x")])
def test_a_place_below_a_file_is_refused(write, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/data(\.partial)?: Not a directory"):
        write(tmp_path / "file" / "data")
