"""Describes a folder of packed data: its manifest and its record files."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader

from lsjax.data.sources import is_train_split
from lsjax.errors import UserError
from lsjax.files import check_not_pointer, in_bucket, path_of
from lsjax.scratch import local_copy, say

MANIFEST = "manifest.json"
NO_DOCUMENT = -1  # the document of a padding token in a record


def read_manifest(directory: Path) -> dict | None:
    """Reads what a folder of packed data holds: request, corpus, splits and files. Returns None when there is none.

    A folder that an earlier version made has one file per split and lists no files; they are added here.
    """
    path = path_of(directory) / MANIFEST
    try:
        if not path.exists():
            return None
        check_not_pointer(path)
        manifest = json.loads(path.read_bytes())
        splits = list(manifest["splits"])
        if len({is_train_split(split) for split in splits}) < 2:
            raise ValueError("it lacks a split")
        counts = [manifest["splits"][split][key] for split in splits for key in ("documents", "sequences", "tokens")]
        corpus = manifest["corpus"]
        if "files" not in manifest:
            sizes = {split: manifest["splits"][split]["sequences"] for split in splits}
            manifest["files"] = {split: {f"{split}.arrayrecord": sizes[split]} for split in splits}
        counts += [count for split in splits for count in manifest["files"][split].values()]
        if not all(type(count) is int for count in (*counts, corpus["documents"], corpus["bytes"])):
            raise ValueError("a count is no whole number")
        if not isinstance(manifest["request"], dict) or not isinstance(corpus["sha256"], str):
            raise ValueError("it holds no request or no sha256")
        return manifest
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise damaged_data(path, error) from None


def local_data(directory: Path, splits: Sequence[str] | None = None, note: Callable[[str], None] = say) -> Path:
    """Returns packed data on a disk: `directory` itself, or a copy if it is in a bucket, which ArrayRecord cannot read.

    splits: those that are wanted; None means all. note: receives lines about a copy that takes long.
    """
    directory = path_of(directory)
    manifest = read_manifest(directory) if in_bucket(directory) else None
    if not in_bucket(directory) or manifest is None:
        return directory
    names = [name for split in splits or manifest["files"] for name in manifest["files"][split]]
    return local_copy(directory, [MANIFEST, *names], note)


def held_out_splits(manifest: dict) -> list[str]:
    """Returns the splits that are not trained on, as `held_out_names` does for a configuration."""
    return [split for split in manifest["splits"] if not is_train_split(split)]


def check_records(directory: Path, files: dict[str, dict[str, int]]) -> None:
    """Raises UserError when a file of records does not hold the number of sequences that is listed.

    files: by split, the number of sequences by file name.
    """
    for counts in files.values():
        for name, count in counts.items():
            try:
                reader = ArrayRecordReader(str(path_of(directory) / name))
                found = reader.num_records()
                reader.close()
            except Exception as error:  # ArrayRecord raises several types for a damaged file
                raise damaged_data(path_of(directory) / name, str(error).strip() or type(error).__name__) from None
            if found != count:
                raise damaged_data(path_of(directory) / name, f"it holds {found} sequences, not {count}")


def damaged_data(path: Path, error: object) -> UserError:
    """Returns the error to raise for a damaged file of packed data, with the remedy."""
    return UserError(f"{path} is damaged ({error}); remove {path.parent} to pack the corpus again")
