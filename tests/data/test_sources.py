"""Reads every kind of file that a corpus may hold: compressed, Parquet, tokens."""

import dataclasses
import gzip
import json

import numpy as np
import pytest

from lsjax.config import DataConfig
from lsjax.data import corpus as corpora
from lsjax.data.corpus import Skipped, list_corpus
from lsjax.data.documents import read_documents
from lsjax.data.prepare import prepare
from lsjax.data.token_files import open_tokens, read_token_documents
from lsjax.data.tokenizer import train_tokenizer
from lsjax.errors import UserError
from tests.helpers.corpora import read_texts

ROWS = [{"text": f"document {index} " + "x" * (index % 50)} for index in range(400)]
TEXTS = [row["text"] for row in ROWS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def compress(content: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(content)
    return pytest.importorskip("backports.zstd").compress(content)


@pytest.fixture
def tokenizer(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    train_tokenizer(TEXTS, 300).save(folder)
    return str(folder)


def texts(path, **settings) -> list[str]:
    return list(read_texts(DataConfig(corpus=str(path), **settings))[0].values())


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_are_read(suffix, tmp_path):
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(LINES, suffix))
    (tmp_path / f"b.md{suffix}").write_bytes(compress("a note, é".encode(), suffix))
    assert texts(tmp_path) == [*TEXTS, "a note, é"]
    assert texts(tmp_path / f"a.jsonl{suffix}") == TEXTS


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damage_of_a_compressed_file_is_named(suffix, tmp_path):
    path = tmp_path / f"rows.jsonl{suffix}"
    whole = compress(LINES, suffix)
    for content in (whole[:-20], whole[:10] + b"x" * 50, b"plain"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"cannot read .*rows\.jsonl\{suffix}"):
            texts(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_stream_is_cut_into_the_same_documents(suffix, tiny_run, tmp_path, monkeypatch):
    plain, packed = tmp_path / "rows.jsonl", tmp_path / f"rows.jsonl{suffix}"
    plain.write_bytes(LINES)
    packed.write_bytes(compress(LINES, suffix))
    monkeypatch.setattr(corpora, "BLOCK_BYTES", 4000)

    def run(path):
        data = dataclasses.replace(tiny_run.data, corpus=str(path), held_out_fraction=0.2)
        return dataclasses.replace(tiny_run, data=data)

    manifest = prepare(run(packed), tmp_path / "packed", lambda _: None, workers=1)[1]
    assert manifest["corpus"] == prepare(run(plain), tmp_path / "plain", lambda _: None, workers=1)[1]["corpus"]
    parts = len(manifest["files"]["train"])
    assert parts >= 4
    if suffix == ".gz":
        prepare(run(packed), tmp_path / "again", lambda _: None, workers=2)
        for name in manifest["files"]["train"]:
            assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "packed" / name).read_bytes()


def test_a_bad_line_of_a_stream_is_named(tiny_run, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "BLOCK_BYTES", 400)
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(LINES + b"broken\n"))
    data = dataclasses.replace(tiny_run.data, corpus=str(path), tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz:401: want a JSON object"):
        prepare(dataclasses.replace(tiny_run, data=data), tmp_path / "data", lambda _: None, workers=1)


def write_parquet(path, column="text", values=TEXTS):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({column: values, "id": range(len(values))}), path, row_group_size=60)


def test_parquet_is_read_by_row_groups(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    write_parquet(path)
    assert texts(path) == TEXTS
    monkeypatch.setattr(corpora, "BLOCK_BYTES", path.stat().st_size // 6)
    units = list(list_corpus(DataConfig(corpus=str(path))).units())
    assert len(units) >= 3
    assert texts(path) == TEXTS


def test_bad_parquet_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    write_parquet(path, column="body")
    with pytest.raises(UserError, match=r'rows\.parquet: want the column "text", got \[.*body'):
        texts(path)
    assert texts(path, text_key="body") == TEXTS
    write_parquet(path, values=[*TEXTS[:99], None])
    with pytest.raises(UserError, match=r'rows\.parquet:100: "text" is NoneType, not a string'):
        texts(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"cannot read .*rows\.parquet"):
        texts(path)


TOKENS = np.array([5, 6, 1, 7, 1, 1, 8, 9, 10, 1, 11], np.uint16)
DOCUMENTS = [[5, 6, 1], [7, 1], [1], [8, 9, 10, 1], [11, 1]]


def test_token_documents_are_whole_wherever_pieces_end():
    for step in range(1, 13):
        found = []
        for start in range(0, len(TOKENS), step):
            end = min(start + step, len(TOKENS))
            found += [document.tolist() for _, document in read_token_documents(TOKENS, 1, start, end)]
        assert found == DOCUMENTS, step


@pytest.mark.parametrize(("name", "dtype"), [("a.npy", "uint16"), ("a.npy", "uint32"), ("a.bin", "uint32")])
def test_token_files_are_packed_as_they_are(name, dtype, tiny_run, tokenizer, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 300, 20_000).astype(dtype)
    (tmp_path / "corpus").mkdir()
    path = tmp_path / "corpus" / name
    np.save(path, tokens) if name.endswith(".npy") else tokens.tofile(path)
    (tmp_path / "corpus" / "README.md").write_text("not tokens")
    data = DataConfig(
        corpus=str(tmp_path / "corpus"),
        held_out_fraction=0.2,
        token_separator=1,
        token_dtype="uint32",
        tokenizer=tokenizer,
    )
    monkeypatch.setattr(corpora, "BLOCK_BYTES", 9_000)
    notes = []
    run = dataclasses.replace(tiny_run, data=data)
    manifest = prepare(run, tmp_path / "data", notes.append, workers=1)[1]
    assert manifest["corpus"]["documents"] == np.sum(tokens[:-1] == 1) + 1 - manifest["skipped"]["documents"].get(
        "without text", 0
    )
    assert "corpus: left out 1 files: README.md (another kind of file)" in notes
    tokens[7] = 400
    np.save(path, tokens) if name.endswith(".npy") else tokens.tofile(path)
    with pytest.raises(UserError, match=r"token 400 is beyond config\.model\.vocab_size \(320\)"):
        prepare(run, tmp_path / "other", lambda _: None, workers=1)


def test_wrong_token_files_are_named(tiny_run, tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((2, 3), np.uint16))
    with pytest.raises(UserError, match=r"a\.npy must hold one row of uint16 or uint32, got uint16 of shape \(2, 3\)"):
        open_tokens(path, "uint16")
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"cannot read .*a\.npy as tokens"):
        open_tokens(path, "uint16")
    np.save(path, TOKENS)
    data = DataConfig(corpus=str(path), token_separator=1)
    with pytest.raises(UserError, match=r"a corpus of tokens needs the tokenizer.*config\.data\.tokenizer"):
        prepare(dataclasses.replace(tiny_run, data=data), tmp_path / "data", lambda _: None)


def test_what_was_left_out_is_counted(tmp_path):
    for index in range(9):
        (tmp_path / f"{index}.txt").write_bytes(b"\xff" if index % 2 else b" \n" if index % 4 else b"text")
    skipped = Skipped()
    corpus = list_corpus(DataConfig(corpus=str(tmp_path)))
    for unit in corpus.units():
        assert [d.text for d in read_documents(unit.pieces, DataConfig(), skipped)] == ["text"] * 3
    for index in range(9):
        skipped.add_file(f"z{index}", "a link to a folder")
    assert skipped.describe() == [
        "left out 13 files: 1.txt (not UTF-8), 3.txt (not UTF-8), 5.txt (not UTF-8), 7.txt (not UTF-8), "
        "z0 (a link to a folder), and 8 more (9 a link to a folder, 4 not UTF-8)",
        "left out 2 documents: 2 without text",
    ]
