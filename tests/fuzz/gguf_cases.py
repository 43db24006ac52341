"""Odd GGUF files, byte by byte: counts, lengths, types, the directory of tensors, split files, fields."""

import functools
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import lsjax
from tests.fuzz.harness import Case
from tests.fuzz.model_cases import has_the_same_weights
from tests.fuzz.mutations import gguf_layout
from tests.helpers.gguf_files import write_gguf

U8, U16, U32, I32, BOOL, STRING, ARRAY = 0, 2, 4, 5, 7, 8, 9  # types of metadata
_F32 = 0  # type of a tensor


class Entry(NamedTuple):
    """An entry of the directory of tensors."""

    name: bytes
    dims: tuple[int, ...]
    kind: int
    offset: int

    def encoded(self) -> bytes:
        """Returns its bytes; numbers are taken modulo 2^64."""
        dims = struct.pack(f"<{len(self.dims)}Q", *(size % 2**64 for size in self.dims))
        return (
            text(self.name)
            + struct.pack("<I", len(self.dims))
            + dims
            + struct.pack("<IQ", self.kind, self.offset % 2**64)
        )


class Parts(NamedTuple):
    """A good file, cut at its seams."""

    num_fields: int
    fields: bytes
    entries: list[Entry]
    data: bytes


def text(value: str | bytes) -> bytes:
    """Returns a text with its length before it."""
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def field(key: str | bytes, kind: int, payload: bytes) -> bytes:
    """Returns a metadata field."""
    return text(key) + struct.pack("<I", kind) + payload


def array(kind: int, count: int, payload: bytes = b"") -> bytes:
    """Returns the payload of an array."""
    return struct.pack("<IQ", kind, count) + payload


@functools.cache
def cut(path: Path) -> Parts:
    """Cuts a good file at its seams."""
    content = path.read_bytes()
    num_tensors, num_fields = struct.unpack("<QQ", content[8:24])
    end_of_fields, start_of_data = gguf_layout(path)
    entries, at = [], end_of_fields
    for _ in range(num_tensors):
        (length,) = struct.unpack_from("<Q", content, at)
        name, at = content[at + 8 : at + 8 + length], at + 8 + length
        (axes,) = struct.unpack_from("<I", content, at)
        dims = struct.unpack_from(f"<{axes}Q", content, at + 4)
        kind, offset = struct.unpack_from("<IQ", content, at + 4 + 8 * axes)
        entries.append(Entry(name, dims, kind, offset))
        at += 4 + 8 * axes + 12
    return Parts(num_fields, content[24:end_of_fields], entries, content[start_of_data:])


def build(parts: Parts, extra: bytes = b"", **change: Any) -> bytes:
    """Returns a file of these parts with one more field, and with what `change` has in place of what is right."""
    entries = change.get("entries", parts.entries)
    header = struct.pack(
        "<4sIQQ",
        change.get("magic", b"GGUF"),
        change.get("version", 3),
        change.get("num_tensors", len(entries)),
        change.get("num_fields", parts.num_fields + change.get("num_extra", bool(extra))),
    )
    head = header + parts.fields + extra + b"".join(entry.encoded() for entry in entries)
    return head + bytes(-len(head) % change.get("alignment", 32)) + change.get("data", parts.data)


def _alignment(size: int) -> dict[str, Any]:
    return {
        "extra": field("general.alignment", U32, struct.pack("<I", size)),
        "alignment": size if 0 < size < 999 else 32,
    }


_ONE = struct.pack("<I", 1)
SAME: dict[str, dict[str, Any]] = {
    "unchanged": {},
    "version 2": {"version": 2},
    "alignment 64": _alignment(64),
    "an empty key": {"extra": field("", U32, _ONE)},
    "a null character": {"extra": field("general.name", STRING, text("a\0b"))},
    "an array of arrays": {
        "extra": field("x", ARRAY, array(ARRAY, 2, array(U32, 1, _ONE) + array(STRING, 1, text("q"))))
    },
    "an empty array": {"extra": field("x", ARRAY, array(U32, 0))},
    "a flag of 2": {"extra": field("x", BOOL, b"\2")},
}  # fmt: skip
WRONG: dict[str, dict[str, Any]] = {
    "another magic": {"magic": b"FUGG"},
    "a key twice, with two values": {"extra": field("llama.block_count", U32, struct.pack("<I", 2))},
    "a key twice, with one value": {"extra": field("llama.block_count", U32, struct.pack("<I", 3))},
    "one field too many": {"extra": b"", "num_extra": 1},
    "one field too few": {"num_extra": -1},
    "2^60 fields": {"num_fields": 2**60},
    "no fields": {"num_fields": 0},
    "2^60 tensors": {"num_tensors": 2**60},
    "no tensors": {"num_tensors": 0},
    "a tensor too few": {"num_tensors": 28},
    "an alignment that is a text": {"extra": field("general.alignment", STRING, text("32"))},
    "a text beyond the end": {"extra": field("x", STRING, struct.pack("<Q", 2**40) + b"abc")},
    "a text of 2^63 bytes": {"extra": field("x", STRING, struct.pack("<Q", 2**63) + b"abc")},
    "a key beyond the end": {"extra": struct.pack("<Q", 2**50) + b"abc"},
    "a key that is not UTF-8": {"extra": field(b"\xff\xfe", U32, _ONE)},
    "a text that is not UTF-8": {"extra": field("general.name", STRING, text(b"\xff\xfe"))},
    "an unknown type": {"extra": field("x", 99, bytes(8))},
    "an array of an unknown type": {"extra": field("x", ARRAY, array(99, 1, bytes(8)))},
    "an array of 2^60 bytes": {"extra": field("x", ARRAY, array(U8, 2**60))},
    "an array of 10^9 bytes": {"extra": field("x", ARRAY, array(U8, 10**9))},
    "an array of 2^60 texts": {"extra": field("x", ARRAY, array(STRING, 2**60))},
    "an array of 2^40 arrays": {"extra": field("x", ARRAY, array(ARRAY, 2**40, bytes(64)))},
    "arrays 5,000 deep": {"extra": field("x", ARRAY, array(ARRAY, 1) * 5000 + array(U32, 1, _ONE))},
    "no data": {"data": b""},
} | {f"alignment {size}": _alignment(size) for size in (0, 1, 8, 33, 2**31)} | {
    f"version {version}": {"version": version} for version in (0, 1, 4, 2**31, 3 << 24)
}  # fmt: skip
# Changes of the first entry of the directory, the embedding [288, 36].
ENTRIES: dict[str, dict[str, Any]] = {
    "a negative size": {"dims": (-36, 288)}, "a size of 0": {"dims": (0, 288)}, "sizes of 2^33": {"dims": (2**33,) * 2},
    "sizes in reverse": {"dims": (288, 36)}, "three axes": {"dims": (36, 144, 2)}, "one axis": {"dims": (36 * 288,)},
    "no axis": {"dims": ()}, "100 axes": {"dims": (1,) * 100}, "an unknown type": {"kind": 99},
    "whole numbers": {"kind": 24}, "float64": {"kind": 28}, "bfloat16": {"kind": 30}, "4 bits": {"kind": 2},
    "an offset beyond the end": {"offset": 2**40}, "a negative offset": {"offset": -32},
    "an offset that is not aligned": {"offset": 4}, "the offset of another": {"offset": 36 * 288 * 4},
    "no name": {"name": b""}, "a name that is not UTF-8": {"name": b"\xff"},
    "a name of 5,000 bytes": {"name": b"x" * 5000},
    "a null character in its name": {"name": b"token_embd.weight\0"}, "a name without a dot": {"name": b"embedding"},
}  # fmt: skip


def structure_cases() -> Iterator[Case]:
    """Files whose structure is wrong, or odd and right."""
    for name, change in SAME.items():
        yield Case(f"gguf bytes: {name}", functools.partial(_load, change=change), has_the_same_weights)
    for name, change in WRONG.items():
        yield Case(f"gguf bytes: {name}", functools.partial(_load, change=change))
    for name, change in ENTRIES.items():
        yield Case(f"gguf directory: {name}", functools.partial(_load_entries, change=change))
    orders = {"a tensor twice": lambda entries: [*entries, entries[0]], "in reverse": lambda entries: entries[::-1]}
    for name, order in orders.items():
        yield Case(f"gguf directory: {name}", functools.partial(_load_order, order=order))


def _load(parts: Any, watch: Any, change: dict[str, Any]) -> tuple[Path, lsjax.Model]:
    change = dict(change)
    return _write(parts, watch, build(cut(parts.gguf), change.pop("extra", b""), **change))


def _load_entries(parts: Any, watch: Any, change: dict[str, Any]) -> tuple[Path, lsjax.Model]:
    first, *others = cut(parts.gguf).entries
    return _write(parts, watch, build(cut(parts.gguf), entries=[first._replace(**change), *others]))


def _load_order(parts: Any, watch: Any, order: Callable[[list], list]) -> tuple[Path, lsjax.Model]:
    return _write(parts, watch, build(cut(parts.gguf), entries=order(cut(parts.gguf).entries)))


def _write(_: Any, watch: Any, content: bytes) -> tuple[Path, lsjax.Model]:
    path = watch.folder / "model.gguf"
    path.write_bytes(content)
    watch.prepared()
    return path, lsjax.load(path)


def split_cases() -> Iterator[Case]:
    """Split files that do not belong together, or are not all there."""
    good: dict[str, dict[str, Any]] = {"the first of two": {}, "the second of two": {"opened": 1}}
    wrong: dict[str, dict[str, Any]] = {
        "the second missing": {"written": (0,)}, "the first missing": {"written": (1,), "opened": 1},
        "two counts": {"counts": (2, 3)}, "counts of 0": {"counts": (0, 0)}, "counts of 1": {"counts": (1, 1)},
        "counts of 65,535": {"counts": (65535,) * 2}, "numbers in reverse": {"numbers": (1, 0)},
        "one number twice": {"numbers": (0, 0)}, "a tensor in both": {"second": 14}, "a tensor in none": {"second": 16},
        "other names": {"names": ("a.gguf", "b.gguf")},
    }  # fmt: skip
    for name, change in good.items():
        yield Case(f"split gguf: {name}", functools.partial(_load_split, change=change), has_the_same_weights)
    for name, change in wrong.items():
        yield Case(f"split gguf: {name}", functools.partial(_load_split, change=change))


def _load_split(parts: Any, watch: Any, change: dict[str, Any]) -> tuple[Path, lsjax.Model]:
    whole, names = cut(parts.gguf), change.get("names", ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf"))
    halves = (whole.entries[:15], whole.entries[change.get("second", 15) :])
    for index in change.get("written", (0, 1)):
        entries, data = [], b""
        for entry in halves[index]:
            entries.append(entry._replace(offset=len(data)))
            data += whole.data[entry.offset : entry.offset + 4 * math.prod(entry.dims)]
            data += bytes(-len(data) % 32)
        fields = field("split.no", U16, struct.pack("<H", change.get("numbers", (0, 1))[index]))
        fields += field("split.count", U16, struct.pack("<H", change.get("counts", (2, 2))[index]))
        fields += field("split.tensors.count", I32, struct.pack("<i", len(whole.entries)))
        content = build(whole, fields, num_extra=3, entries=entries, data=data)
        (watch.folder / names[index]).write_bytes(content)
    watch.prepared()
    path = watch.folder / names[change.get("opened", 0)]
    return path, lsjax.load(path)


_TOKENS = 270  # of the tokenizer of the recorded model
_ANY = "tokenizer.ggml."
FIELDS: dict[str, tuple[Any, ...]] = {
    **{f"{_ANY}{name}_token_id": (True, False, 2.0, "2", [2]) for name in ("bos", "eos", "eot", "eom", "unknown")},
    f"{_ANY}add_bos_token": ("false", 0, 1, 0.0, [True]),
    f"{_ANY}add_space_prefix": ("false", 1, [True]),
    f"{_ANY}token_type": ([1] * (_TOKENS - 1), [1] * (_TOKENS + 1), ["x"] * _TOKENS, [1.5] * _TOKENS, 1, "x"),
    f"{_ANY}tokens": (["a"], [*range(_TOKENS)], ["a"] * _TOKENS, "a", 3, [""] * _TOKENS),
    f"{_ANY}merges": ("x", ["nospace"], ["a b c"], ["qq zz"], [" "], [1], ["\u0120 t"]),
    f"{_ANY}model": ("", "GPT2", "bert", "t5", 3),
    f"{_ANY}pre": ("", "qwen2", 3),
    "llama.rope.scaling.type": ("yarn", 3, "longrope"),
    "llama.rope.scaling.factor": (-4.0, math.nan, math.inf, "4", True),
    "llama.rope.scaling.attn_factor": (2.0, "1"),
    "llama.rope.freq_base": (0.0, -1.0, math.nan, True),
    "llama.attention.causal": (False, 0),
    "llama.attention.head_count": (0, 9.0, [9, 8, 9]),
    "llama.attention.head_count_kv": ([3, 3, 2], 0, 3.0, 4),
    "llama.context_length": (0, 128.0),
    "llama.feed_forward_length": ([1, 2, 3], 0),
    "llama.expert_count": (8, "x"),
}  # fmt: skip
_TENSORS = {
    "a table of factors with NaN": ("rope_freqs.weight", [math.nan, 1]),
    "a table of factors of 0": ("rope_freqs.weight", [0, 0]),
    "a table of negative factors": ("rope_freqs.weight", [1, -2]),
    "a bias": ("blk.0.attn_q.bias", [1] * 36),
    "an expert": ("blk.0.ffn_gate_exps.weight", [[1] * 36] * 36),
    "no name of a tensor": ("weird", [1, 2]),
    "a layer that is no number": ("blk.x.attn_norm.weight", [1] * 36),
    "a negative layer": ("blk.-1.attn_norm.weight", [1] * 36),
    "a layer of two spellings": ("blk.00.attn_norm.weight", [1] * 36),
}


def field_cases() -> Iterator[Case]:
    """Fields of other types and sizes, each of which llama.cpp refuses, or which would mean another model."""
    for key, values in FIELDS.items():
        for number, value in enumerate(values):
            change = {"fields": {key: value}}
            yield Case(f"gguf {key} of another kind, {number}", functools.partial(_load_fields, change=change))
    for key in ("tokens", "token_type", "model", "pre", "merges", "eos_token_id"):
        change = {"without": [_ANY + key]}
        yield Case(f"gguf without {_ANY}{key}", functools.partial(_load_fields, change=change))
    for name, (tensor, values) in _TENSORS.items():
        change = {"tensors": {tensor: np.array(values, np.float32)}}
        yield Case(f"gguf with {name}", functools.partial(_load_fields, change=change))


def _load_fields(_: Any, watch: Any, change: dict[str, Any]) -> tuple[Path, lsjax.Model]:
    path = write_gguf(watch.folder / "model.gguf", "smollm2", **change)
    watch.prepared()
    return path, lsjax.load(path)


def odd_gguf_cases() -> Iterator[Case]:
    """Returns all of them."""
    yield from structure_cases()
    yield from split_cases()
    yield from field_cases()
