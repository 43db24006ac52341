"""Ways to damage a file: its bytes, the values of a JSON object, the header of safetensors, the metadata of GGUF."""

import json
import math
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf

Damage = Callable[[Path], None]

# Values that do not belong where JSON has a number, a text, a flag, a list or an object. Python reads NaN and Infinity.
VALUES: dict[str, Any] = {
    "null": None, "true": True, "-1": -1, "0": 0, "1.5": 1.5, "1e300": 1e300, "1e-300": 1e-300, "2**31": 2**31,
    "2**63": 2**63, "10**30": 10**30, "NaN": math.nan, "Infinity": math.inf, "text": "x",
    "empty text": "", "7 as text": "7",
    "[]": [], "[1]": [1], "[null]": [None], "[true]": [True], "{}": {}, "{x: 1}": {"x": 1}, "surrogate": "\ud800",
    "control characters": "a\0\n\u2028", "long text": "y" * 5000, "[[[]]]": [[[]]], "a path out": "../../x",
}  # fmt: skip


def truncate(fraction: float) -> Damage:
    """Returns a damage that keeps the first part of a file."""

    def damage(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * fraction)])

    return damage


def replace_with(data: bytes) -> Damage:
    """Returns a damage that puts other bytes into a file."""
    return lambda path: void(path.write_bytes(data))


def append(data: bytes) -> Damage:
    """Returns a damage that adds bytes at the end of a file."""
    return lambda path: void(path.write_bytes(path.read_bytes() + data))


def flip_bits(seed: int, count: int = 1, first: int = 0, last: int | None = None) -> Damage:
    """Returns a damage that flips some bits of the bytes first..last - 1."""

    def damage(path: Path) -> None:
        rng, data = random.Random(seed), bytearray(path.read_bytes())
        for _ in range(count):
            data[rng.randrange(first, min(last or len(data), len(data)))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)

    return damage


def garbage(seed: int, size: int = 3000) -> Damage:
    """Returns a damage that fills a file with random bytes."""
    return replace_with(random.Random(seed).randbytes(size))


def delete(path: Path) -> None:
    """Deletes a file."""
    path.unlink()


def folder_instead(path: Path) -> None:
    """Puts a folder in the place of a file."""
    path.unlink()
    path.mkdir()


def loop_instead(path: Path) -> None:
    """Puts a symbolic link to itself in the place of a file."""
    path.unlink()
    path.symlink_to(path.name)


WHOLE_FILE: dict[str, Damage] = {
    "deleted": delete, "emptied": replace_with(b""), "halved": truncate(0.5), "short of one byte": truncate(0.9999),
    "garbage": garbage(1), "zeros": replace_with(bytes(5000)), "a folder": folder_instead, "a loop": loop_instead,
    "a Git LFS pointer": replace_with(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5\n"
    ),
    "nested 100,000 deep": replace_with(b'{"a":' * 100_000), "a list": replace_with(b"[1]"),
    "null": replace_with(b"null"),
    "UTF-16": replace_with('{"model_type": "llama"}'.encode("utf-16")), "bytes after its end": append(b"\0garbage"),
    "a web page": replace_with(b"<!DOCTYPE html><html><body>404</body></html>"),
}  # fmt: skip


def edit_json(change: Callable[[dict], Any]) -> Damage:
    """Returns a damage that changes the JSON object in a file."""

    def damage(path: Path) -> None:
        tree = json.loads(path.read_text())
        change(tree)
        path.write_text(json.dumps(tree))

    return damage


def set_key(keys: tuple, value: Any) -> Damage:
    """Returns a damage that sets one key of a JSON object, given by its path."""

    def change(tree: Any) -> None:
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = value

    return edit_json(change)


def drop_key(keys: tuple) -> Damage:
    """Returns a damage that removes one key of a JSON object."""

    def change(tree: Any) -> None:
        for key in keys[:-1]:
            tree = tree[key]
        del tree[keys[-1]]

    return edit_json(change)


def key_paths(tree: Any, depth: int = 3) -> Iterator[tuple]:
    """Yields the paths of the keys in nested objects, and of the first entry of each list."""
    entries = tree.items() if isinstance(tree, dict) else list(enumerate(tree))[:1] if isinstance(tree, list) else ()
    for key, value in entries:
        yield (key,)
        if depth > 1:
            yield from ((key, *rest) for rest in key_paths(value, depth - 1))


def json_damages(path: Path, rng: random.Random, count: int, keys: list[tuple] | None = None) -> dict[str, Damage]:
    """Returns damages of random keys of a JSON file: other values, missing keys."""
    paths = keys or list(key_paths(json.loads(path.read_text())))
    found = {}
    while len(found) < count:
        keys, name = rng.choice(paths), rng.choice([*VALUES, "missing"])
        text = ".".join(map(str, keys))[:60]
        found[f"{text} {name}"] = drop_key(keys) if name == "missing" else set_key(keys, VALUES[name])
    return found


def edit_header(change: Callable[[dict], Any]) -> Damage:
    """Returns a damage that changes the header of a safetensors file, whose data stays."""

    def damage(path: Path) -> None:
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        tree = json.loads(data[8 : 8 + size])
        text = change(tree)
        header = text if isinstance(text, bytes) else json.dumps(tree).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])

    return damage


def _set(name: str, key: str, value: Any) -> Damage:
    return edit_header(lambda tree: tree[name].__setitem__(key, value))


_TENSOR = "model.layers.1.mlp.down_proj.weight"
_NORM = "model.norm.weight"

SAFETENSORS: dict[str, Damage] = {
    "a dtype of another size": _set(_TENSOR, "dtype", "F16"),
    "an integer dtype": _set(_TENSOR, "dtype", "I32"),
    "an unknown dtype": _set(_TENSOR, "dtype", "F33"),
    "a dtype that is a number": _set(_TENSOR, "dtype", 3),
    "a swapped shape": edit_header(lambda t: t[_TENSOR]["shape"].reverse()),
    "a shape with a zero": _set(_TENSOR, "shape", [0, 56]),
    "a negative shape": _set(_TENSOR, "shape", [-36, -56]),
    "a shape of one axis": _set(_TENSOR, "shape", [36 * 56]),
    "a shape with an axis more": _set(_TENSOR, "shape", [36, 56, 1]),
    "a huge shape": _set(_TENSOR, "shape", [2**40, 2**40]),
    "offsets that overlap": _set(_NORM, "data_offsets", [0, 144]),
    "offsets beyond the end": _set(_NORM, "data_offsets", [10**9, 10**9 + 144]),
    "offsets in reverse": _set(_NORM, "data_offsets", [144, 0]),
    "negative offsets": _set(_NORM, "data_offsets", [-144, 0]),
    "offsets of fractions": _set(_NORM, "data_offsets", [0.5, 144.5]),
    "no offsets": edit_header(lambda t: t[_NORM].pop("data_offsets")),
    "a tensor renamed": edit_header(lambda t: t.__setitem__("model.norm.bias", t.pop(_NORM))),
    "a tensor named twice": edit_header(
        lambda t: json.dumps(t).encode().replace(b"model.layers.2.mlp.up_proj", b"model.layers.1.mlp.up_proj")
    ),
    "a name with odd characters": edit_header(lambda t: t.__setitem__("\ud800\0é", t.pop(_NORM))),
    "an empty header": edit_header(lambda t: t.clear()),
    "metadata of numbers": edit_header(lambda t: t.__setitem__("__metadata__", {"a": 1})),
    "a header of garbage": edit_header(lambda _: b"\xff" * 200),
    "a header of 2**63 bytes": lambda path: void(
        path.write_bytes(struct.pack("<Q", 2**63) + path.read_bytes()[8:])
    ),
}  # fmt: skip


def gguf_layout(path: Path) -> tuple[int, int]:
    """Returns where the tensors' directory of a GGUF file begins and where their data begins, in bytes."""
    reader = gguf.GGUFReader(path)
    fields = max(int(field.offset) + sum(part.nbytes for part in field.parts) for field in reader.fields.values())
    return fields, int(reader.data_offset)


def void(_: Any) -> None:
    """Drops a value, so that a lambda returns none."""
