"""Odd files of the other readers: Parquet, tokens, compressed lines, tables, adapters, lists of tokens."""

import dataclasses
import functools
import gzip
import io
import json
import math
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from safetensors.numpy import save, save_file

import lsjax
from lsjax.benchmarks.prompts import read_prompts
from lsjax.evaluation.tasks.rows import read_rows
from lsjax.io.draft_vocabulary import ids_digest, read_list
from lsjax.io.exit_adapter import read_exit_adapter
from tests.fuzz.harness import Case
from tests.fuzz.mutations import VALUES
from tests.fuzz.text_cases import texts_of


def reader_cases() -> Iterator[Case]:
    """Returns all of them."""
    for cases in (parquet_cases, token_cases, compressed_cases, depth_cases, table_cases, adapter_cases, list_cases):
        yield from cases()


def equals(expected: Any) -> Callable[[Any, Any], None]:
    """Returns the check that a result is what it must be."""

    def check(_: Any, result: Any) -> None:
        assert result == expected, f"{str(result)[:300]} is not {str(expected)[:300]}"

    return check


def _corpus_case(name: str, file: str, data: bytes, expected: Any = None, **settings: Any) -> Case:
    """Returns a case that reads the documents of a file; without `expected` it must be refused."""

    def call(parts, watch):
        path = watch.folder / file
        path.write_bytes(data)
        watch.prepared()
        settings_of_data = dataclasses.replace(parts.config.data, corpus=str(path), **settings)
        return (
            documents(settings_of_data) if settings.get("token_separator") is not None else texts_of(settings_of_data)
        )

    return Case(name, call, None if expected is None else equals(expected))


def documents(data: Any) -> list[list[int]]:
    """Returns the tokens of all documents of a corpus of tokens."""
    from lsjax.data.corpus import list_corpus
    from lsjax.data.documents import read_documents

    corpus = list_corpus(data)
    found = [d.tokens for unit in corpus.units() for d in read_documents(unit.pieces, data, corpus.skipped)]
    return [tokens.tolist() for tokens in found if tokens is not None]


def _parquet(**columns: Any) -> bytes:
    return _table(pyarrow.table(columns))


def _table(table: Any) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


def parquet_cases() -> Iterator[Case]:
    """Parquet files with other columns, other types, and damages."""
    bad_text = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(np.array([0, 2], np.int32)), pyarrow.py_buffer(b"\xff\xfe")]
    )
    far = pyarrow.array([2**62], pyarrow.timestamp("us"))
    text = {
        "no such column": _parquet(x=["a"]), "no text": _parquet(text=pyarrow.array(["a", None])),
        "numbers": _parquet(text=[1, 2]), "bytes": _parquet(text=pyarrow.array([b"a"], pyarrow.binary())),
        "a text that is not UTF-8": _parquet(text=bad_text), "lists": _parquet(text=[["a"]]),
        "objects": _parquet(text=[{"a": "b"}]), "no columns": _table(pyarrow.table({})),
        "dates of far ages": _parquet(text=far),
        "a column twice": _table(pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])),
        "cut": _parquet(text=["a" * 1000] * 100)[:-10], "garbage": b"PAR1" + bytes(100) + b"PAR1", "nothing": b"",
    }  # fmt: skip
    for name, data in text.items():
        yield _corpus_case(f"parquet: {name}", "a.parquet", data)
    for name, column in {"large": pyarrow.array(["a", "b"], pyarrow.large_string()), "of few values": pyarrow.array(
        ["a", "b"]).dictionary_encode()}.items():  # fmt: skip
        yield _corpus_case(f"parquet: texts that are {name}", "a.parquet", _parquet(text=column), ["a", "b"])
    yield _corpus_case("parquet: a name in capitals", "A.PARQUET", _parquet(text=["a", "b"]), ["a", "b"])
    said = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.timestamp("us"))])
    rows = {
        "dates of far ages": pyarrow.array([[{"role": "assistant", "content": 2**62}]], pyarrow.list_(said)),
        "bytes": pyarrow.array([[{"role": "assistant", "content": b"x"}]]),
        "pairs": pyarrow.array([[("a", "b")]], pyarrow.map_(pyarrow.string(), pyarrow.string())),
        "no assistant": pyarrow.array([[{"role": "user", "content": "a"}]]),
    }
    for name, column in rows.items():
        yield _corpus_case(f"parquet, chat: {name}", "a.parquet", _parquet(messages=column), format="chat")
    none = pyarrow.array([None], pyarrow.string())
    yield _corpus_case("parquet, completion: none", "a.parquet", _parquet(prompt=["a"], completion=none),
                       format="completion")  # fmt: skip


class _Runs:
    """An object whose unpickling makes a folder in the current directory."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("unpickled",)


def _npy(values: Any, dtype: Any = None, **settings: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(values, dtype), **settings)
    return file.getvalue()


def _npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.zeros(2, np.uint16))
    return file.getvalue()


def _header(text: str) -> bytes:
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode() + bytes(64)


_LAYOUT = "{{'descr': {}, 'fortran_order': False, 'shape': {}}}\n"


def token_cases() -> Iterator[Case]:
    """Files of tokens of another type or shape, with headers that are no header, and pickles, which must not run."""
    good = {
        "two documents": (_npy([1, 2, 0, 3, 0], np.uint16), [[1, 2, 0], [3, 0]]),
        "no token": (_npy([], np.uint16), []),
    }
    for name, (data, expected) in good.items():
        yield _corpus_case(f"tokens: {name}", "a.npy", data, expected, token_separator=0)
    wrong = {
        "int64": _npy([1, 0]), "floats": _npy([1.0, 0.0]), "two axes": _npy(np.zeros((2, 2)), np.uint16),
        "no axis": _npy(3, np.uint16), "another byte order": _npy([1, 0], ">u2"), "flags": _npy([True]),
        "records": _npy(np.zeros(2, [("a", "u2")])), "objects": _npy([_Runs()], object, allow_pickle=True),
        "a pickle": pickle.dumps(_Runs()), "an archive": _npz(), "cut": _npy(range(100), np.uint16)[:-20],
        "half a header": _npy(range(100), np.uint16)[:40], "a magic alone": b"\x93NUMPY", "nothing": b"",
        "another version": b"\x93NUMPY\x09\0" + bytes(100),
    } | {f"the header {name}": _header(text) for name, text in {
        "of a negative size": _LAYOUT.format("'<u2'", "(-1,)"), "of 10^18": _LAYOUT.format("'<u2'", f"({10**18},)"),
        "of a fraction": _LAYOUT.format("'<u2'", "(1.5,)"), "of a flag": _LAYOUT.format("'<u2'", "(True,)"),
        "of objects": _LAYOUT.format("'|O'", "(1,)"), "of brackets": "(" * 3000, "of signs": "-" * 9000 + "1",
        "of lists": "[" * 900 + "]" * 900, "of a call": "__import__('os').mkdir('called')",
    }.items()}  # fmt: skip
    for name, data in wrong.items():
        yield _corpus_case(f"tokens: {name}", "a.npy", data, token_separator=0)
    yield _corpus_case("tokens: half a token", "a.bin", b"\1\0\2", token_separator=0)
    yield _corpus_case("tokens: half a wide token", "a.bin", bytes(6), token_separator=0, token_dtype="uint32")
    yield _corpus_case("tokens: .bin", "a.bin", b"\1\0\0\0", [[1, 0]], token_separator=0)
    yield _corpus_case("tokens: .bin, empty", "a.bin", b"", [], token_separator=0)


_LINES = b'{"text": "one"}\n{"text": "two"}\n'
_BOTH = ["one", "two"]


def compressed_cases() -> Iterator[Case]:
    """Lines in .gz and .zst files that are cut, joined, damaged, or what their names do not say; other names."""
    packed = gzip.compress(_LINES)
    good = {
        "one": packed, "two members": gzip.compress(_LINES[:16]) + gzip.compress(_LINES[16:]),
        "a line in two members": gzip.compress(_LINES[:9]) + gzip.compress(_LINES[9:]),
        "zeros at its end": packed + bytes(99),
    }  # fmt: skip
    wrong = {
        "cut": gzip.compress(_LINES * 1000)[:-5], "another checksum": packed[:-8] + bytes(8), "no gzip": _LINES,
        "garbage at its end": packed + b"garbage", "a header alone": packed[:10], "zstd": _zstd(_LINES),
    }  # fmt: skip
    for name, data in good.items():
        yield _corpus_case(f".jsonl.gz: {name}", "a.jsonl.gz", data, _BOTH)
    for name, data in wrong.items():
        yield _corpus_case(f".jsonl.gz: {name}", "a.jsonl.gz", data)
    frame = b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"abcd"  # one that readers skip
    good = {
        "one": _zstd(_LINES),
        "two frames": _zstd(_LINES[:9]) + _zstd(_LINES[9:]),
        "a frame to skip": frame + _zstd(_LINES),
    }
    wrong = {"cut": _zstd(_LINES * 1000)[:-5], "garbage at its end": _zstd(_LINES) + b"garbage", "gzip": packed,
             "no zstd": _LINES}  # fmt: skip
    for name, data in good.items():
        yield _corpus_case(f".jsonl.zst: {name}", "a.jsonl.zst", data, _BOTH)
    for name, data in wrong.items():
        yield _corpus_case(f".jsonl.zst: {name}", "a.jsonl.zst", data)
    for file in ("A.JSONL", "a.ndjson", "a.jsonlines", "a.NDJSON.GZ"):
        data = packed if file.endswith("GZ") else _LINES
        yield _corpus_case(f"lines in {file}", file, data, _BOTH)


def _zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


def depth_cases() -> Iterator[Case]:
    """Rows nested so deep that one of Python's own limits is near."""
    rows: dict[str, Callable[[str], Any]] = {
        "chat": lambda text: {"messages": [{"role": "assistant", "content": text}]},
        "completion": lambda text: {"prompt": "a", "completion": "b", "other": text},
        "text": lambda text: {"text": "a", "other": text},
    }
    for layout, row in rows.items():
        for depth in (300, 940, 960, 975, 985, 990, 995, 2000):
            data = json.dumps(row("@")).replace('"@"', "[" * depth + "]" * depth).encode() + b"\n"
            yield Case(f"{layout}: a row nested {depth} deep", functools.partial(_read_deep, data=data, layout=layout),
                       lambda _, found: None)  # fmt: skip


def _read_deep(parts: Any, watch: Any, data: bytes, layout: str) -> list[str]:
    path = watch.folder / "a.jsonl"
    path.write_bytes(data)
    watch.prepared()
    return texts_of(dataclasses.replace(parts.config.data, corpus=str(path), format=layout))


def table_cases() -> Iterator[Case]:
    """Tables of tasks, and a pipe and a device for prompts."""
    good = {
        "a BOM": ("a.csv", b"\xef\xbb\xbfa,b\n1,2\n"), "tabs": ("a.tsv", b"a\tb\n1\t2\n"),
        "capitals": ("A.CSV", b"a,b\n1,2\n"),
        "old line ends": ("a.csv", b"a,b\r1,2\r"), "too many values": ("a.csv", b"a,b\n1,2,3\n"),
    }  # fmt: skip
    for name, (file, data) in good.items():
        yield Case(f"table: {name}", functools.partial(_read_table, file=file, data=data), equals([("1", "2")]))
    wrong = {
        "too few values": ("a.csv", b"a,b\n1\n"), "Latin-1": ("a.csv", b"a,b\n\xe9,1\n"), "nothing": ("a.csv", b""),
        "a header alone": ("a.csv", b"a,b\n"), "UTF-16": ("a.csv", "a,b\n1,2\n".encode("utf-16")),
        "no such column": ("a.csv", b"a,c\n1,2\n"), "a text": ("a.txt", b"a,b\n1,2\n"),
        "no Parquet": ("a.parquet", b"x"),
        "a field of 17 million characters": ("a.csv", b"a,b\n" + b"x" * (2**24 + 5) + b",1\n"),
        "numbers": ("a.jsonl", b'{"a": 1, "b": "x"}'),
    }  # fmt: skip
    for name, (file, data) in wrong.items():
        yield Case(f"table: {name}", functools.partial(_read_table, file=file, data=data))
    for name, path in {"a folder": "/", "a folder of the system": "/proc", "nothing": "/dev/null"}.items():
        yield Case(f"prompts: {name} of the system", lambda *_, path=path: read_prompts(Path(path)))


def _read_table(_: Any, watch: Any, file: str, data: bytes) -> list[tuple[str, str]]:
    path = watch.folder / file
    path.write_bytes(data)
    watch.prepared()
    return [(row["a"], row["b"]) for row in read_rows(path, ("a", "b"))]


_RANK, _WIDTH, _INNER = 2, 36, 56  # of the recorded model
_FACTOR = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
_SETTINGS: dict[str, Any] = {
    "peft_type": "LORA",
    "r": _RANK,
    "lora_alpha": 4,
    "target_modules": ["down_proj"],
    "bias": "none",
}


def _factors() -> dict[str, np.ndarray]:
    shapes = {"lora_A": (_RANK, _INNER), "lora_B": (_WIDTH, _RANK)}
    name = "base_model.model.model.layers.{}.mlp.down_proj.{}.weight"
    return {
        name.format(layer, side): np.ones(shape, np.float32) for layer in range(3) for side, shape in shapes.items()
    }


def adapter_cases() -> Iterator[Case]:
    """Adapters of PEFT, and of exits, with odd settings and tensors."""
    settings = {
        "peft_type": (None, "LOHA", 1), "lora_alpha": (None, True, "x", math.nan, 1e300, 10**400, -(10**400), [], {}),
        "use_rslora": ("false", 1, []), "use_dora": (True, "x"), "bias": ("all", 3), "fan_in_fan_out": (True,),
        "modules_to_save": (["lm_head"], "x"), "alpha_pattern": ({"q": 3}, 3), "megatron_config": ({"a": 1},),
        "target_modules": (["up_proj"], ["down_proj", "q_proj"]),
    }  # fmt: skip
    for key, values in settings.items():
        for number, value in enumerate(values):
            change = _SETTINGS | {key: value}
            yield Case(f"PEFT {key} {number}", functools.partial(_load_peft, settings=change, factors=_factors()))
    good = _factors()
    tensors: dict[str, dict[str, np.ndarray]] = {
        "NaN": {_FACTOR: np.full((2, 56), np.nan, np.float32)}, "another rank": {_FACTOR: np.ones((3, 56), np.float32)},
        "one axis": {_FACTOR: np.ones(56, np.float32)}, "three axes": {_FACTOR: np.ones((1, 2, 56), np.float32)},
        "whole numbers": {_FACTOR: np.ones((2, 56), np.int32)}, "float64": {_FACTOR: np.ones((2, 56))},
        "another one": {"zz": np.ones(2, np.float32)}, "layer 99": {_FACTOR.replace(".0.", ".99."): good[_FACTOR]},
        "infinite products": {_FACTOR: np.full((2, 56), 3e38, np.float32)},
    }  # fmt: skip
    for name, change in tensors.items():
        yield Case(f"PEFT tensors: {name}", functools.partial(_load_peft, settings=_SETTINGS, factors=good | change))
    for name, dropped in {
        "no A": (_FACTOR,),
        "no layer 2": [key for key in good if ".2." in key],
        "none": good,
    }.items():
        rest = {key: value for key, value in good.items() if key not in dropped}
        yield Case(f"PEFT tensors: {name}", functools.partial(_load_peft, settings=_SETTINGS, factors=rest))
    for number, layer in enumerate((None, "", "0", "3", "-1", "1.0", "9" * 5000, " 1", "²")):
        yield Case(f"exit adapter: layer {number}", functools.partial(_read_exit, layer=layer))
    kernels = {"another width": np.eye(37), "NaN": np.full((36, 36), np.nan), "one axis": np.ones(36)}
    for name, kernel in kernels.items():
        tensors = {"kernel": kernel.astype(np.float32)}
        yield Case(f"exit adapter: {name}", functools.partial(_read_exit, layer="1", tensors=tensors))
    for name, names in {"another name": ("k",), "two tensors": ("kernel", "b")}.items():
        tensors = {key: np.eye(36, dtype=np.float32) for key in names}
        yield Case(f"exit adapter: {name}", functools.partial(_read_exit, layer="1", tensors=tensors))


def _load_peft(parts: Any, watch: Any, settings: dict, factors: dict[str, np.ndarray]) -> lsjax.Model:
    folder = watch.folder / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(factors, folder / "adapter_model.safetensors")
    watch.prepared()
    return lsjax.load(parts.huggingface, adapter=folder)


def _read_exit(parts: Any, watch: Any, layer: str | None, tensors: dict[str, np.ndarray] | None = None) -> Any:
    path = watch.folder / "exit_adapter.safetensors"
    tensors = tensors or {"kernel": np.eye(36, dtype=np.float32)}
    path.write_bytes(save(tensors, metadata=None if layer is None else {"exit_layer": layer}))
    watch.prepared()
    return read_exit_adapter(path, parts.model.config)


def list_cases() -> Iterator[Case]:
    """Lists of frequent tokens with odd entries."""
    ids = list(range(50))
    good = {"ids": ids, "vocab_size": 288, "sha256": ids_digest(np.array(ids)), "counts": ids, "source": "x"}
    for key in ("ids", "vocab_size", "sha256"):
        for name, value in VALUES.items():
            if name not in ("surrogate", "[1]") or key != "ids":
                yield Case(
                    f"draft list {key}: {name}", functools.partial(_read_ids, tree=good | {key: value}), equals(ids)
                )
    for number, wrong in enumerate(([1, 1], [1.0], ["1"], [-1], [288], [2**70], [[1]], list(range(289)))):
        yield Case(f"draft list of other ids {number}", functools.partial(_read_ids, tree={"ids": wrong}))


def _read_ids(_: Any, watch: Any, tree: dict) -> list[int]:
    path = watch.folder / "draft_vocabulary.json"
    path.write_text(json.dumps(tree))
    watch.prepared()
    return read_list(path, 288).tolist()
