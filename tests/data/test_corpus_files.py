"""Reads corpora as people have them: odd JSONL, folders of shards, other encodings, names that are not UTF-8."""

import dataclasses
import gzip
import json
import os

import pytest

from lsjax.benchmarks.prompts import read_prompts
from lsjax.config import DataConfig
from lsjax.data.jsonl import read_jsonl
from lsjax.data.packed import read_manifest
from lsjax.data.pipeline import held_out_batches, training_batches
from lsjax.data.prepare import prepare
from lsjax.errors import UserError
from tests.helpers.corpora import read_texts

ROWS = [{"text": f"document {i}", "prompt": f"document {i}"} for i in range(40)]


def jsonl(odd: str | None = None, end: str = "\n") -> str:
    """Returns 40 lines, the fourth of them `odd`."""
    lines = [json.dumps(row) for row in ROWS]
    if odd is not None:
        lines[3] = odd
    return end.join(lines) + end


def texts(path, **settings) -> dict[str, str]:
    return read_texts(DataConfig(corpus=str(path), **settings))[0]


def both(text: str) -> str:
    """Returns a line with the same text for a corpus and as a prompt, not escaped."""
    return json.dumps({"text": text, "prompt": text}, ensure_ascii=False)


GOOD = {
    "a byte order mark": ("\ufeff" + jsonl(), "document 3"),
    "carriage returns": (jsonl(end="\r\n"), "document 3"),
    "no last line feed": (jsonl()[:-1], "document 3"),
    "a line separator": (jsonl(both("one\u2028two")), "one\u2028two"),
    "a next line, a form feed": (jsonl(both("one\x85two")), "one\x85two"),
    "an escaped pair of surrogates": (jsonl(r'{"text": "\ud83d\ude00", "prompt": "\ud83d\ude00"}'), "\U0001f600"),
    "more keys": (jsonl('{"text": "x", "prompt": "x", "n": NaN, "meta": {"a": [1]}}'), "x"),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("what", GOOD)
def test_odd_lines_are_read(what, suffix, tmp_path):
    content, text = GOOD[what]
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(content.encode()) if suffix.endswith("gz") else content.encode())
    wanted = [row["text"] for row in ROWS]
    wanted[3] = text
    assert sorted(texts(path).values()) == sorted(wanted)
    assert read_prompts(path) == wanted
    assert [number for number, _ in read_jsonl(path)] == list(range(1, 41))


DEEP = "[" * 100_000 + "]" * 100_000
BAD = {
    "half a surrogate pair": (jsonl(r'{"text": "a\ud83d", "prompt": "a\ud83d"}').encode(), ":4: .*half of a surrogate"),
    "null": (jsonl('{"text": null, "prompt": null}').encode(), ":4: .*(not a string|non-empty text)"),
    "a number": (jsonl('{"text": 5, "prompt": 5}').encode(), ":4: .*not a string"),
    "another key": (jsonl('{"body": "x"}').encode(), ":4: .*"),
    "a list": (jsonl('["x"]').encode(), ":4: want a JSON object, got list"),
    "two objects": (jsonl('{"text": "a"} {"text": "b"}').encode(), ":4: want a JSON object"),
    "deep nesting": (jsonl(f'{{"text": {DEEP}, "prompt": {DEEP}}}').encode(), ":4: want a JSON object: .*recursion"),
    "many digits": (jsonl(f'{{"text": {"9" * 5000}, "prompt": 1}}').encode(), ":4: want a JSON object: .*4300"),
    "Latin-1": (jsonl('{"text": "caf\u00e9", "prompt": "caf\u00e9"}').encode("latin-1"), ":4: byte 14 of the line"),
    "UTF-16": (jsonl().encode("utf-16"), " is UTF-16; save it as UTF-8"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("read", [texts, read_prompts])
def test_bad_lines_are_named_by_file_and_line(what, read, tmp_path):
    content, message = BAD[what]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"rows\.jsonl{message}"):
        read(path)


def test_a_damaged_archive_is_named(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    for content in (gzip.compress(jsonl().encode())[:-20], b"\x1f\x8b" + b"x" * 50, b"plain"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"cannot read .*rows\.jsonl\.gz"):
            texts(path)


def test_a_folder_of_shards_is_read_line_by_line(tmp_path):
    for shard in range(3):
        rows = [json.dumps({"text": f"{shard}-{i}\nmore", "meta": {"id": i}}) + "\n" for i in range(10)]
        (tmp_path / f"shard-{shard}.jsonl").write_text("".join(rows))
    (tmp_path / "last.jsonl.gz").write_bytes(gzip.compress(b'{"text": "last"}\n'))
    (tmp_path / "notes.txt").write_text("plain text")
    found = texts(tmp_path)
    assert len(found) == 32
    assert found["shard-2.jsonl:10"] == "2-9\nmore"
    assert found["last.jsonl.gz:1"] == "last"
    assert found["notes.txt"] == "plain text"
    (tmp_path / "other.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(UserError, match=r'other\.jsonl:1: .*"text" string.*file_pattern chooses the files'):
        texts(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '[{"text": "one"}, {"text": "two"}]'),
        ("a.JSON", '\n[\n  {"id": 1, "text": "one"}\n]\n'),
        ("a.json", '{"text": "one"}\n{"text": "two"}\n'),
        ("a-00000-of-01024.json.gz", gzip.compress(b'{"url": "x", "text": "one"}\n{"url": "y", "text": "two"}\n')),
    ],
)
def test_rows_under_a_name_of_plain_text_are_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "b.txt").write_text("plain text")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=rf'{name} holds rows with the key "text".* save them as \.jsonl'):
            texts(path)
    assert texts(tmp_path, file_pattern="*.txt") == {"b.txt": "plain text"}


def test_other_json_is_plain_text(tmp_path):
    contents = ['{"name": "x",\n "text": 3}\n', "[1, 2]", "[]", "", "{", '"text"', '{"texts": "a"}', "[[]]"]
    for index, content in enumerate(contents):
        (tmp_path / f"{index}.json").write_text(content)
    (tmp_path / "x.txt").write_text('{"text": "an example of a row"}')
    assert len(texts(tmp_path)) == len(contents)  # all but the empty one, and x.txt


@pytest.fixture
def odd_folder(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(20):
        (folder / f"{index:02}.txt").write_text(f"text {index}\n" * 3)
    (folder / "mark.txt").write_bytes(b"\xef\xbb\xbfwith a mark\n")
    (folder / "returns.txt").write_bytes(b"a\r\nb\r\n")
    (folder / "latin1.txt").write_bytes("café".encode("latin-1"))
    (folder / "utf16.txt").write_bytes("wide".encode("utf-16"))
    (folder / "utf16-unmarked.txt").write_bytes("wide".encode("utf-16-le"))
    (folder / "gone.txt").symlink_to(tmp_path / "gone.txt")
    os.mkfifo(folder / "pipe.txt")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "linked.txt").write_text("behind a link")
    (folder / "link").symlink_to(tmp_path / "other")
    return folder


def test_a_folder_says_what_it_left_out(odd_folder, tiny_run, tmp_path):
    found = texts(odd_folder)
    assert len(found) == 22
    assert found["mark.txt"] == "with a mark\n"
    assert found["returns.txt"] == "a\nb\n"
    skipped = read_texts(DataConfig(corpus=str(odd_folder)))[1]
    assert skipped.files == {
        "not UTF-8": 2,
        "a link to a folder": 1,
        "a link to nothing": 1,
        "a pipe or a device": 1,
        "null characters, so no text in UTF-8": 1,
    }
    assert {"gone.txt (a link to nothing)", "pipe.txt (a pipe or a device)"} < {*skipped.names}
    notes = []
    config = dataclasses.replace(
        tiny_run,
        data=dataclasses.replace(tiny_run.data, corpus=str(odd_folder), held_out_fraction=0.3),
        training=dataclasses.replace(tiny_run.training, sequence_length=8),
    )
    prepare(config, tmp_path / "data", notes.append)
    assert any(note.startswith("corpus: left out 6 files: gone.txt (a link to nothing), ") for note in notes)


def test_a_folder_without_any_text_names_what_it_left_out(tiny_run, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"\xff\xfe\xff")
    config = dataclasses.replace(tiny_run, data=DataConfig(corpus=str(folder)))
    with pytest.raises(UserError, match=r"is empty.*left out 1 files: a\.txt \(not UTF-8\)"):
        prepare(config, tmp_path / "data", lambda _: None)
    assert list(tmp_path.iterdir()) == [folder]


def test_names_that_are_not_utf8_are_read(tmp_path):
    for index in range(20):
        try:
            (tmp_path / os.fsdecode(b"caf\xe9-%d.txt" % index)).write_text(f"text {index}")
        except OSError:
            pytest.skip("this file system has only names in UTF-8")
    assert len(texts(tmp_path)) == 20


@pytest.mark.parametrize("pattern", ["**.txt", "a/**b", "", "/x"])
def test_a_pattern_that_is_none_is_named(pattern, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    try:
        list(tmp_path.glob("**.txt"))
    except ValueError:
        pass
    else:
        if "**" in pattern:
            pytest.skip("this Python takes ** within a name")
    with pytest.raises(UserError, match=r"config\.data\.file_pattern"):
        texts(tmp_path, file_pattern=pattern)


def test_a_name_of_300_characters_is_no_corpus():
    with pytest.raises(UserError, match=r"config\.data\.corpus"):
        texts("x" * 300)
    with pytest.raises(UserError, match="cannot read"):
        read_manifest("x" * 300)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"splits": 5}', '{"a": ' * 100_000, '{"request": {}}'])
def test_a_damaged_manifest_is_named(content, tiny_run, tmp_path):
    prepare(tiny_run, tmp_path / "data", lambda _: None)
    (tmp_path / "data" / "manifest.json").write_text(content)
    for call in (lambda: read_manifest(tmp_path / "data"), lambda: prepare(tiny_run, tmp_path / "data", print)):
        with pytest.raises(UserError, match=r"manifest\.json is damaged .*remove .*data to pack the corpus again"):
            call()


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: b"garbage" * 999, lambda data: data[: len(data) // 2]]
)
def test_damaged_records_are_named(damage, tiny_run, tmp_path):
    prepare(tiny_run, tmp_path / "data", lambda _: None)
    for split in ("train", "held_out"):
        path = tmp_path / "data" / f"{split}-000000-0000.arrayrecord"
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"train-000000-0000\.arrayrecord is damaged"):
        training_batches(tmp_path / "data", 8, 32, seed=0)
    with pytest.raises(UserError, match=r"held_out-000000-0000\.arrayrecord is damaged"):
        held_out_batches(tmp_path / "data", 8, 32, 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_said_to_be_left_out(tmp_path):
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "closed").mkdir(mode=0)
    _, skipped = read_texts(DataConfig(corpus=str(tmp_path)))
    assert skipped.names == ["closed (a folder that may not be read)"]
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        read_texts(DataConfig(corpus=str(tmp_path / "closed")))
