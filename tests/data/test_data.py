"""Checks the way from text to batches: nothing lost, disjoint splits, the same batches on any number of hosts."""

import dataclasses
import json

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from lsjax.config import DataConfig
from lsjax.data.corpus import list_corpus
from lsjax.data.documents import digest_of, is_held_out
from lsjax.data.examples import all_learned
from lsjax.data.packed import read_manifest
from lsjax.data.packers import Packer
from lsjax.data.pipeline import held_out_batches, training_batches, unpack
from lsjax.data.prepare import prepare
from lsjax.data.tokenizer import train_tokenizer
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.errors import UserError
from tests.helpers.corpora import read_texts


def test_the_embedded_corpus_is_the_standard_library():
    found, _ = read_texts(DataConfig())
    assert 300 < len(found) < 900
    assert 6e6 < sum(len(text.encode()) for text in found.values()) < 12e6
    assert list_corpus(DataConfig()).identity() == list_corpus(DataConfig()).identity()
    assert "argparse.py" in found
    assert not any("site-packages" in name or name.startswith(("test/", "idlelib/")) for name in found)


def test_folder_and_jsonl_give_the_same_documents(text_folder, tiny_run, tmp_path):
    texts = sorted(read_texts(DataConfig(corpus=str(text_folder)))[0].values())
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    assert sorted(read_texts(DataConfig(corpus=str(path), text_key="body"))[0].values()) == texts
    rows = dataclasses.replace(
        tiny_run, data=dataclasses.replace(tiny_run.data, corpus=str(path), text_key="body", held_out_fraction=0.2)
    )
    manifests = [prepare(config, tmp_path / name, lambda _: None)[1] for name, config in (("a", tiny_run), ("b", rows))]
    assert manifests[0]["corpus"] == manifests[1]["corpus"]
    counts = [[m["splits"][split]["documents"] for split in ("train", "held_out")] for m in manifests]
    assert counts[0] == counts[1]
    assert all(counts[0])


def test_a_text_is_held_out_by_its_content():
    texts = [f"text {index}" for index in range(2000)]
    held_out = {text for text in texts if is_held_out(digest_of(text.encode()), 0.1)}
    assert 150 < len(held_out) < 250
    assert held_out < {text for text in texts if is_held_out(digest_of(text.encode()), 0.2)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "neither"),
        ("", "is empty"),
        ('{"text": "a"}\nnot json\n', r"corpus.jsonl:2: want a JSON object"),
        ('{"other": "a"}\n', r'corpus.jsonl:1: want a JSON object with a "text"'),
        ('{"text": 3}\n', "not a string"),
        ('{"text": "only one"}\n', "too few to split"),
    ],
)
def test_a_bad_corpus_is_named_and_leaves_nothing_behind(tiny_run, tmp_path, content, message):
    path = tmp_path / "corpus.jsonl"
    if content is not None:
        path.write_text(content)
    config = dataclasses.replace(tiny_run, data=DataConfig(corpus=str(path)))
    with pytest.raises(UserError, match=message):
        prepare(config, tmp_path / "data", lambda _: None)
    assert set(tmp_path.iterdir()) <= {path}


def test_binary_and_hidden_files_are_left_out(tmp_path):
    (tmp_path / "image.bin").write_bytes(b"\xff\xfe\x00\x80")
    (tmp_path / ".hidden").write_text("secret")
    for index in range(8):
        (tmp_path / f"{index}.txt").write_text(f"text {index}")
    assert list(read_texts(DataConfig(corpus=str(tmp_path)))[0]) == [f"{i}.txt" for i in range(8)]


def test_the_tokenizer_round_trips_any_text_and_reloads(text_folder, tmp_path):
    texts = [path.read_text() for path in sorted(text_folder.iterdir())]
    tokenizer = train_tokenizer(texts, 400)
    assert tokenizer.vocab_size == 400
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.begin, again.stop) == (tokenizer.begin, tokenizer.stop)
    for text in [*texts[:2], "tabs\t, ünïcödé, 漢字 and \x00 bytes 🙂", "  leading spaces"]:
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.begin
        assert tokenizer.decode(ids) == text
        assert again.encode(text) == ids
    *_, last = tokenizer.encode_documents(texts)
    assert last[0] == tokenizer.begin
    assert last[-1] == tokenizer.stop[0]
    # The text of a special token in a document is not the special token.
    assert tokenizer.stop[0] not in tokenizer.encode("a <|end_of_text|> b")


@pytest.mark.parametrize("last", [2, 3, 4])
def test_packing_loses_nothing_and_pads_the_tail(last):
    documents = [list(range(start, start + size)) for start, size in ((0, 7), (100, 3), (200, 25), (300, last))]
    packer = Packer(8)
    windows = [window for document in documents for window in packer.add(all_learned(document))] + list(packer.finish())
    flat = [token for document in documents for token in document]
    assert len(windows) == packer.sequences == -(-(len(flat) - 1) // 8)
    assert packer.padding == 8 * len(windows) - (len(flat) - 1)
    for index, (tokens, owners) in enumerate(windows):
        want = flat[8 * index : 8 * index + 9]
        assert tokens.tolist() == want + [0] * (9 - len(want))
        assert owners.tolist() == [token // 100 for token in want] + [-1] * (9 - len(want))


def test_padding_is_never_learned():
    tokens = np.array([10, 11, 12, 0, 0, 0], np.int32)
    batch = unpack(np.stack([tokens, np.array([4, 4, 5, -1, -1, -1], np.int32)]).tobytes(), 5)
    assert batch.weights.tolist() == [1, 0, 0, 0, 0]
    assert batch.positions.tolist() == [0, 1, 0, 0, 1]
    assert batch.segment_ids.tolist() == [0, 0, 1, 2, 2]


def test_unpacked_documents_start_anew_and_never_predict_each_other():
    tokens = np.arange(10, 17, dtype=np.int32)
    owners = np.array([4, 4, 5, 5, 5, 6, 6], np.int32)
    batch = unpack(np.stack([tokens, owners]).tobytes(), 6)
    assert batch.tokens.tolist() == [10, 11, 12, 13, 14, 15]
    assert batch.targets.tolist() == [11, 12, 13, 14, 15, 16]
    assert batch.weights.tolist() == [1, 0, 1, 1, 0, 1]
    assert batch.positions.tolist() == [0, 1, 0, 1, 2, 0]
    assert batch.segment_ids.tolist() == [0, 0, 1, 1, 1, 2]


@pytest.fixture
def packed(tiny_run, tmp_path):
    directory = tmp_path / "data"
    prepare(tiny_run, directory, lambda _: None)
    return directory


def rows(batches, count):
    return [np.asarray(next(batches).tokens) for _ in range(count)]


def test_batches_are_the_same_on_any_number_of_hosts_and_from_any_start(packed):
    whole = rows(training_batches(packed, 8, 32, seed=3), 12)
    # The rows that a host's devices hold need not be adjacent.
    for shares in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]], [[0, 1, 6], [2, 3, 4, 5, 7]]):
        parts = [training_batches(packed, 8, 32, seed=3, rows=share) for share in shares]
        for step in range(12):
            for share, part in zip(shares, parts, strict=True):
                assert (next(part).tokens == whole[step][share]).all()
    resumed = rows(training_batches(packed, 8, 32, seed=3, first_batch=5), 7)
    assert all((a == b).all() for a, b in zip(resumed, whole[5:], strict=True))
    other = rows(training_batches(packed, 8, 32, seed=4), 1)
    assert (other[0] != whole[0]).any()


def test_an_epoch_reads_every_sequence_once(packed):
    reader = ArrayRecordReader(str(packed / "train-000000-0000.arrayrecord"))
    stored = [np.frombuffer(record, np.int32).reshape(2, 33)[0, :-1].tobytes() for record in reader.read_all()]
    assert len(stored) == read_manifest(packed)["splits"]["train"]["sequences"]
    seen = np.concatenate(rows(training_batches(packed, 1, 32, seed=0), len(stored)))
    assert sorted(row.tobytes() for row in seen) == sorted(stored)


def test_held_out_batches_are_whole_and_fixed(packed):
    first = held_out_batches(packed, 8, 32, max_batches=2)
    assert len(first) == 2
    assert all(batch.tokens.shape == (8, 32) for batch in first)
    for share in ([0, 1, 2, 3], [4, 5, 6, 7], [1, 6]):
        assert (held_out_batches(packed, 8, 32, 2, share)[1].tokens == first[1].tokens[share]).all()


def test_packed_data_is_reused_only_for_the_same_request(packed, tiny_run):
    before = (packed / "train-000000-0000.arrayrecord").stat().st_mtime_ns
    prepare(tiny_run, packed, lambda _: None)
    assert (packed / "train-000000-0000.arrayrecord").stat().st_mtime_ns == before
    longer = dataclasses.replace(tiny_run, training=dataclasses.replace(tiny_run.training, sequence_length=64))
    with pytest.raises(UserError, match="holds data packed for"):
        prepare(longer, packed, lambda _: None)


def test_too_little_text_leaves_nothing_behind(tiny_run, tmp_path):
    huge = dataclasses.replace(tiny_run, training=dataclasses.replace(tiny_run.training, sequence_length=10**6))
    with pytest.raises(UserError, match="shorter than one sequence"):
        prepare(huge, tmp_path / "data", lambda _: None)
    assert list(tmp_path.iterdir()) == []
