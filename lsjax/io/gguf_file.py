"""Reads the metadata and the list of tensors of a GGUF file, or of all files of a split one."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from lsjax.errors import UserError

_PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


class GGUFTensor(NamedTuple):
    """A tensor and the file that holds it."""

    path: Path
    header: gguf.ReaderTensor


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Returns the fields and the tensors of a GGUF file, by name.

    `path` may be any file of a split GGUF, NAME-00001-of-00003.gguf: all of them are read, and the fields are those
    of the first. Raises UserError when a file is damaged or missing.
    """
    fields, tensors = _read_file(path)
    count = fields.get("split.count", 1)
    if count in (0, 1):
        return fields, tensors
    fields, tensors = {}, {}
    for number, part in enumerate(_parts(path, count)):
        part_fields, part_tensors = _read_file(part)
        if (part_fields.get("split.no"), part_fields.get("split.count")) != (number, count):
            raise UserError(f"{part} is not file {number + 1} of {count} of the split GGUF of {path}")
        if repeated := tensors.keys() & part_tensors.keys():
            raise UserError(f"{part} repeats the tensor {min(repeated)} of an earlier file of this split GGUF")
        fields = fields or part_fields
        tensors |= part_tensors
    total = fields.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise UserError(f"{path}: the {count} files of this split GGUF hold {len(tensors)} tensors, not {total}")
    return fields, tensors


def part_names(name: str) -> list[str]:
    """Returns the names of all files of the split GGUF that `name` is a part of; `name` alone if it is not a part."""
    part = _PART_NAME.fullmatch(name)
    if not part:
        return [name]
    return [f"{part[1]}-{number:05}-of-{part[3]}.gguf" for number in range(1, int(part[3]) + 1)]


def _parts(path: Path, count: int) -> list[Path]:
    """Returns the paths of all files of a split GGUF, of which `path` is one."""
    name = _PART_NAME.fullmatch(path.name)
    if type(count) is not int or not name or int(name[3]) != count:
        raise UserError(
            f"{path} is one of the {count} files of a split GGUF, but its name is not NAME-00001-of-{count:05}.gguf; "
            "rename all of them so, or merge them with: llama-gguf-split --merge"
        )
    parts = [path.with_name(part) for part in part_names(path.name)]
    if missing := [part for part in parts if not part.is_file()]:
        raise UserError(f"{path} is one of the {count} files of a split GGUF; {missing[0]} is missing")
    return parts


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    try:
        with np.errstate(over="ignore"):  # an offset of nearly 2^64, which is refused below
            reader = _Reader(path)
        if reader.endianess != gguf.GGUFEndian.LITTLE:
            raise ValueError("it is big-endian")
        _check_offsets(reader)
        fields = {name: _value(field) for name, field in reader.fields.items()}
    except Exception as error:  # the library raises many types for a damaged file
        raise UserError(f"{path} is damaged, or no GGUF file: {error}") from None
    return fields, {tensor.name: GGUFTensor(path, tensor) for tensor in reader.tensors}


class _Reader(gguf.GGUFReader):
    """The library's reader, which ends where the file does. On its own it goes on for as long as a length claims."""

    def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **kwargs: Any) -> Any:
        if int(offset) + int(count) * np.dtype(dtype).itemsize > self.data.nbytes:
            raise ValueError("it ends early")
        return super()._get(offset, dtype, count, *args, **kwargs)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if gguf.GGUFValueType(raw_type) == gguf.GGUFValueType.ARRAY:
            # The length is checked before the library looks at the entries, each of which takes it microseconds.
            kind = gguf.GGUFValueType(self._get(orig_offs, np.uint32)[0])
            dtype = self.gguf_scalar_to_np.get(kind, np.uint64)  # a text begins with its length, an array with 12 bytes
            self._get(orig_offs + 12, dtype, int(self._get(orig_offs + 4, np.uint64)[0]))
        return super()._get_field_parts(orig_offs, raw_type)


def _check_offsets(reader: gguf.GGUFReader) -> None:
    """Checks that the tensors follow each other, each aligned, as llama.cpp requires. The library does not."""
    expected = reader.data_offset
    for tensor in reader.tensors:
        if tensor.data_offset != expected:
            raise ValueError(f"its tensor {tensor.name} starts at byte {tensor.data_offset}, not {expected}")
        expected += -(-tensor.n_bytes // reader.alignment) * reader.alignment


def _value(field: gguf.ReaderField) -> Any:
    """Returns the value of a field. The library's own accessor takes seconds for the strings of a vocabulary."""
    if field.types and field.types[0] == gguf.GGUFValueType.ARRAY and field.types[-1] == gguf.GGUFValueType.STRING:
        return [bytes(field.parts[index]).decode("utf-8") for index in field.data]
    return field.contents()
