"""Text to learn from: the running interpreter's own standard library, a folder of text, or a JSONL file."""

import dataclasses
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from lsjax.config import DataConfig
from lsjax.errors import UserError

# Of the standard library: generated tables, test suites and vendored copies teach a model little.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo"}
_SKIPPED_FOLDERS |= {"ensurepip", "pydoc_data", "encodings", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Document:
    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents, each whole in one split."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]

    def fingerprint(self) -> dict[str, int | str]:
        """Count, bytes and SHA-256 of everything: what "the same corpus" means."""
        digest, size = hashlib.sha256(), 0
        documents = sorted(self.train + self.held_out, key=lambda d: d.name)
        for document in documents:
            for part in (document.name, document.text):
                encoded = part.encode()
                digest.update(len(encoded).to_bytes(8, "little"))
                digest.update(encoded)
            size += len(encoded)
        return {"documents": len(documents), "bytes": size, "sha256": digest.hexdigest()}


def load_corpus(config: DataConfig) -> Corpus:
    """Reads config.corpus and splits it. Raises UserError when there is nothing to learn or to hold out."""
    documents = sorted(_read(config), key=lambda d: d.name)
    documents = [d for d in documents if d.text.strip()]
    if not documents:
        raise UserError(f"config.data.corpus {config.corpus!r} is empty: no UTF-8 text matches {config.file_pattern!r}")
    held_out = tuple(d for d in documents if _is_held_out(d.name, config.held_out_fraction))
    train = tuple(d for d in documents if not _is_held_out(d.name, config.held_out_fraction))
    if not train or not held_out:
        raise UserError(
            f"config.data.corpus {config.corpus!r} has {len(documents)} document(s), too few to split: "
            f"{len(train)} to train, {len(held_out)} held out; change config.data.held_out_fraction"
        )
    return Corpus(train, held_out)


def _read(config: DataConfig) -> Iterator[Document]:
    if config.corpus == "python":
        return _python_standard_library()
    path = Path(config.corpus)
    if config.corpus and path.is_dir():
        if not config.file_pattern or Path(config.file_pattern).is_absolute():
            raise UserError(f'config.data.file_pattern must be relative, such as "**/*.txt": {config.file_pattern!r}')
        return _folder(path, config.file_pattern, skipped=set())
    if path.is_file() and path.suffix == ".jsonl":
        return _jsonl(path, config.text_key)
    raise UserError(f'config.data.corpus {config.corpus!r} is neither "python", nor a folder, nor a .jsonl file')


def _is_held_out(name: str, fraction: float) -> bool:
    """A fixed pseudo-random choice by name: adding a document never moves another."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < fraction * 2**64


def _python_standard_library() -> Iterator[Document]:
    return _folder(Path(sysconfig.get_paths()["stdlib"]), "**/*.py", _SKIPPED_FOLDERS)


def _folder(root: Path, pattern: str, skipped: set[str]) -> Iterator[Document]:
    for path in sorted(root.glob(pattern)):
        relative = path.relative_to(root)
        if any(part.startswith(".") or part in skipped for part in relative.parts) or not path.is_file():
            continue
        try:
            yield Document(relative.as_posix(), path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue  # not text
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None


def _jsonl(path: Path, text_key: str) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line.decode("utf-8"))[text_key]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f'{path}:{number}: want a JSON object with a "{text_key}" string: {error}') from None
            if not isinstance(text, str):
                raise UserError(f'{path}:{number}: "{text_key}" is {type(text).__name__}, not a string')
            yield Document(f"{number:012d}", text)
