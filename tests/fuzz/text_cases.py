"""Malformed corpora and files of prompts."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lsjax.benchmarks.prompts import read_prompts
from lsjax.config import DataConfig
from lsjax.data.corpus import list_corpus
from lsjax.data.documents import read_documents
from tests.fuzz import mutations
from tests.fuzz.harness import Case
from tests.fuzz.model_cases import damaged_copy
from tests.fuzz.mutations import Damage


def text_cases() -> Iterator[Case]:
    """Corpora and files of prompts."""
    for name, data in JSON_LINES.items():
        yield Case(
            f"corpus .jsonl: {name}", functools.partial(_read_corpus, name="c.jsonl", data=data), documents_are_right
        )
        data = data.replace(b'"text"', b'"prompt"')
        yield Case(f"prompts .jsonl: {name}", functools.partial(_read_prompts, data=data), prompts_are_right)
    for name, make in FOLDERS.items():
        yield Case(f"corpus folder: {name}", functools.partial(_read_folder, make=make), _whole_texts)
    for number, pattern in enumerate(_PATTERNS):
        yield Case(f"corpus pattern {number}", functools.partial(_read_pattern, pattern=pattern),
                   lambda _, texts: None)  # fmt: skip
    for name in mutations.WHOLE_FILE:
        yield Case(f"prompts: {name}", functools.partial(_damaged_prompts, damage=mutations.WHOLE_FILE[name]),
                   prompts_are_right)  # fmt: skip


_GOOD = b'{"text": "one two three"}\n'
JSON_LINES = {
    "U+2028 in a text": '{"text": "a\u2028b"}\n'.encode() + 9 * _GOOD,
    "U+0085 and form feed": '{"text": "a\u0085b\x0bc"}\n'.encode() + 9 * _GOOD,
    "a carriage return": b'{"text": "a"}\r\n' * 9,
    "a BOM": b"\xef\xbb\xbf" + 9 * _GOOD,
    "a lone surrogate": b'{"text": "\\ud800"}\n' + 9 * _GOOD,
    "nested 100,000 deep": b'{"text": ' + b"[" * 100_000 + b"\n" + 9 * _GOOD,
    "a number of 10,000 digits": b'{"text": "a", "n": ' + b"9" * 10_000 + b"}\n" + 9 * _GOOD,
    "an exponent": b'{"text": "a", "n": 1e999999}\n' + 9 * _GOOD,
    "NaN": b'{"text": NaN}\n' + 9 * _GOOD,
    "a list": b"[1]\n" + 9 * _GOOD,
    "a text alone": b'"a"\n' + 9 * _GOOD,
    "a key twice": b'{"text": "a", "text": "b"}\n' + 9 * _GOOD,
    "another key": b'{"texts": "a"}\n' + 9 * _GOOD,
    "a number for a text": b'{"text": 3}\n' + 9 * _GOOD,
    "null for a text": b'{"text": null}\n' + 9 * _GOOD,
    "a list for a text": b'{"text": ["a"]}\n' + 9 * _GOOD,
    "an unfinished line": 9 * _GOOD + b'{"text": "a',
    "no last newline": 9 * _GOOD + b'{"text": "end"}',
    "two objects in a line": b'{"text": "a"} {"text": "b"}\n' + 9 * _GOOD,
    "a comma at the end": b'{"text": "a"},\n' + 9 * _GOOD,
    "Latin-1": '{"text": "é"}\n'.encode("latin-1") + 9 * _GOOD,
    "UTF-16": (9 * _GOOD).decode().encode("utf-16"),
    "null bytes": b"\0\0\0\n" + 9 * _GOOD,
    "an escaped null": b'{"text": "a\\u0000b"}\n' + 9 * _GOOD,
    "empty lines": b"\n\n \n" + 9 * _GOOD + b"\n\n",
    "nothing": b"",
    "spaces": b"  \n\t\n",
    "gzip": b"\x1f\x8b\x08\0" + bytes(100),
    "single quotes": b"{'text': 'a'}\n" + 9 * _GOOD,
    "one long line": b'{"text": "' + b"ab " * 300_000 + b'"}\n' + 9 * _GOOD,
}


def lines_of(data: bytes, key: str) -> list[str] | None:
    """Reads JSON lines by the letter of the format: only \\n ends a line. None where a line is not what it must be."""
    texts = []
    for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        if not line.strip():
            continue
        try:
            text = json.loads(line.decode("utf-8"))[key]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        if not isinstance(text, str):
            return None
        texts.append(text)
    return texts


def _read_corpus(parts: Any, watch: Any, name: str, data: bytes) -> tuple[bytes, list[str]]:
    path = watch.folder / name
    path.write_bytes(data)
    watch.prepared()
    return data, texts_of(dataclasses.replace(parts.config.data, corpus=str(path)))


def texts_of(data: DataConfig) -> list[str]:
    """Returns the texts of all documents of a corpus."""
    corpus = list_corpus(data)
    return [d.text for unit in corpus.units() for d in read_documents(unit.pieces, data, corpus.skipped)]


def documents_are_right(_: Any, result: tuple[bytes, list[str]]) -> None:
    """Checks the documents of a corpus against those that the letter of the format gives."""
    expected = lines_of(result[0], "text")
    assert expected is not None, f"read {len(result[1])} documents of a file with a line that is wrong"
    assert sorted(result[1]) == sorted(text for text in expected if text.strip())
    assert all(text.encode() for text in result[1])


def _read_prompts(_: Any, watch: Any, data: bytes) -> tuple[bytes, list[str]]:
    path = watch.folder / "p.jsonl"
    path.write_bytes(data)
    watch.prepared()
    return data, list(read_prompts(path))


def _damaged_prompts(parts: Any, watch: Any, damage: Damage) -> tuple[bytes, list[str]]:
    path = damaged_copy(parts.prompts, watch, "p.jsonl", "", damage)
    prompts = list(read_prompts(path))
    return path.read_bytes(), prompts


def prompts_are_right(_: Any, result: tuple[bytes, list[str]]) -> None:
    """Checks prompts against those that the letter of the format gives."""
    assert result[1] == lines_of(result[0], "prompt")
    assert all(text.encode() for text in result[1])


def _many(folder: Path) -> None:
    for index in range(9):
        (folder / f"{index}.txt").write_text(f"text number {index}")


def _write(folder: Path, name: str | bytes, data: bytes) -> None:
    with open(os.path.join(os.fsencode(folder), name if isinstance(name, bytes) else name.encode()), "wb") as file:
        file.write(data)


FOLDERS: dict[str, Callable[[Path], Any]] = {
    "a name of 255 characters": lambda f: _write(f, "n" * 251 + ".txt", b"a text"),
    "a name that is not UTF-8": lambda f: _write(f, b"\xff\xfe.txt", b"a text"),
    "a name with a newline": lambda f: _write(f, "a\nb.txt", b"a text"),
    "a file that is not UTF-8": lambda f: _write(f, "latin.txt", "é".encode("latin-1")),
    "a BOM": lambda f: _write(f, "bom.txt", b"\xef\xbb\xbfa text"),
    "null bytes": lambda f: _write(f, "null.txt", b"a\0b"),
    "an empty file": lambda f: _write(f, "empty.txt", b""),
    "a loop of links": lambda f: (f / "loop.txt").symlink_to("loop.txt"),
    "a link to its own folder": lambda f: (f / "self").symlink_to(f),
    "a link to nothing": lambda f: (f / "gone.txt").symlink_to("nowhere"),
    "a pipe": lambda f: os.mkfifo(f / "pipe.txt"),
    "a deep folder": lambda f: (f / "/".join("d" * 60)).mkdir(parents=True),
}


def _read_folder(parts: Any, watch: Any, make: Callable[[Path], Any]) -> list[str]:
    folder = watch.folder / "corpus"
    folder.mkdir()
    _many(folder)
    make(folder)
    watch.prepared()
    return texts_of(dataclasses.replace(parts.config.data, corpus=str(folder)))


_PATTERNS = (".", "..", "../*", "*/../*", "***", "[", "a[", "", "/", "/etc/*", "~/*", "**", "**/", "*\0*", "x" * 5000)


def _read_pattern(parts: Any, _: Any, pattern: str) -> list[str]:
    texts = texts_of(dataclasses.replace(parts.config.data, corpus=str(parts.corpus), file_pattern=pattern))
    assert not texts, f"the pattern {pattern!r} finds {len(texts)} texts"
    return texts


def _whole_texts(_: Any, texts: list[str]) -> None:
    """Checks that a folder's good texts are there, each once, and that a text has no BOM and can be encoded."""
    assert {f"text number {index}" for index in range(9)} <= set(texts)
    assert len(texts) <= 10
    assert not any("\ufeff" in text for text in texts)
    assert all(text.encode() for text in texts)
