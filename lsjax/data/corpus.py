"""Lists the files of a corpus and cuts them into units of work.

The units follow from the names and sizes of the files alone. Whichever process packs a unit, on whichever host, it
reads the same documents.
"""

import dataclasses
import errno
import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from lsjax.config import DataConfig
from lsjax.data.compressed import READ_ERRORS, is_compressed, open_bytes, unreadable
from lsjax.data.jsonl import is_jsonl, read_line
from lsjax.data.own_folders import UNFINISHED, kind_of_folder, own_folder_finder
from lsjax.data.parquet import is_parquet, row_group_count
from lsjax.data.token_files import is_token_file, open_tokens
from lsjax.errors import UserError
from lsjax.files import in_bucket, path_of

TRAIN, HELD_OUT = "train", "held_out"  # names of splits
BLOCK_BYTES = 32 << 20  # bytes of text that are packed together; a part of the result, so not a setting

# Folders left out of the standard library: generated tables, test suites and vendored copies teach a model little.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo"}
_SKIPPED_FOLDERS |= {"ensurepip", "pydoc_data", "encodings", "__pycache__"}


class Piece(NamedTuple):
    """A part of one file, read by one process.

    path: the file. name: its path inside the corpus. start, end: the lines that begin in these bytes of a JSONL file,
    these row groups of a Parquet file, or the documents that begin in these tokens of a token file; end None means the
    end of the file. data: the lines, for a file that another process decompresses. lines_before: lines of the file
    before this piece; None where nobody counted them.
    """

    path: str
    name: str
    start: int = 0
    end: int | None = None
    data: bytes | None = None
    lines_before: int | None = 0


class Unit(NamedTuple):
    """Files, or a part of a file, that one job packs.

    size: bytes on disk. splits: as of `Corpus`. is_stream: the unit is one compressed file, which can only be read from
    its beginning and is cut into blocks while it is read.
    """

    number: int
    pieces: tuple[Piece, ...]
    size: int
    splits: tuple[str, ...]
    is_stream: bool = False


class Block(NamedTuple):
    """The work that one process packs at once: a whole unit, or the next part of a stream. is_last: ends its unit."""

    unit: int
    part: int
    is_last: bool
    pieces: tuple[Piece, ...]
    size: int
    splits: tuple[str, ...]


class Skipped:
    """Counts what was left out.

    files, documents: the number of each, by reason. names: the first files, each with its reason.
    """

    def __init__(self, tree: dict[str, Any] | None = None):
        tree = tree or {}
        self.files = Counter(tree.get("files", {}))
        self.documents = Counter(tree.get("documents", {}))
        self.names = list(tree.get("names", []))

    def add_file(self, name: str, reason: str) -> None:
        """Counts a file that matches the pattern but is not read."""
        self.files[reason] += 1
        self._show([f"{_shown(name)} ({reason})"])

    def merge(self, tree: dict[str, Any]) -> None:
        """Adds what another process counted and `to_dict` returned there."""
        other = Skipped(tree)
        self.files += other.files
        self.documents += other.documents
        self._show(other.names)

    def _show(self, names: Sequence[str]) -> None:
        self.names = [*self.names, *names][:5]

    def to_dict(self) -> dict[str, Any]:
        """Returns the counts as plain values."""
        return {"files": dict(self.files), "documents": dict(self.documents), "names": self.names}

    def describe(self) -> list[str]:
        """Returns one line about files and one about documents, each only if something was left out."""
        lines = []
        count = self.files.total()
        if count:
            more = f", and {count - len(self.names)} more ({_reasons(self.files)})" if count > len(self.names) else ""
            lines.append(f"left out {count} files: {', '.join(sorted(self.names))}{more}")
        if self.documents:
            lines.append(f"left out {self.documents.total()} documents: {_reasons(self.documents)}")
        return lines


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The files of a corpus in the order of their names.

    named: the key and the path or name, for messages. root: the folder, or "" where names are paths. files: the name
    and the bytes on disk of each. data: how they are read. skipped: files that the listing left out. splits: the split
    of its documents, or the two splits that their content divides them among: to train on, and held out.
    """

    named: str
    root: str
    files: tuple[tuple[str, int], ...]
    data: DataConfig
    skipped: Skipped
    splits: tuple[str, ...] = (TRAIN, HELD_OUT)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(size for _, size in self.files)

    def identity(self) -> str:
        """Returns the SHA-256 of all names and sizes: equal on every host that sees the same files."""
        digest = hashlib.sha256()
        for name, size in self.files:
            encoded = name.encode("utf-8", "surrogateescape")
            digest.update(b"%d %d " % (len(encoded), size) + encoded)
        return digest.hexdigest()

    def units(self, number: int = 0) -> Iterator[Unit]:
        """Yields the units in order, numbered from `number` on.

        Each holds about BLOCK_BYTES on disk, or is one compressed JSONL file.
        """
        pieces, size = [], 0
        for name, file_size in self.files:
            is_stream = is_compressed(name) and is_jsonl(name) and file_size > BLOCK_BYTES // 4
            for piece, piece_size in self._pieces(name, file_size):
                if pieces and (is_stream or size >= BLOCK_BYTES):
                    yield Unit(number, tuple(pieces), size, self.splits)
                    number, pieces, size = number + 1, [], 0
                pieces.append(piece)
                size += piece_size
            if is_stream:
                yield Unit(number, tuple(pieces), size, self.splits, is_stream=True)
                number, pieces, size = number + 1, [], 0
        if pieces:
            yield Unit(number, tuple(pieces), size, self.splits)

    def _pieces(self, name: str, size: int) -> Iterator[tuple[Piece, int]]:
        """Yields the parts of a file that are read on their own, and the bytes of each."""
        path, kind = path_of(self.root or ".") / name, kind_of(name, self.data)
        if kind == "jsonl" and not is_compressed(name):
            for start in range(0, size, BLOCK_BYTES):
                end = min(start + BLOCK_BYTES, size)
                yield Piece(str(path), name, start, end, lines_before=None if start else 0), end - start
        elif kind == "tokens" or (kind == "parquet" and size > BLOCK_BYTES):
            count = row_group_count(path) if kind == "parquet" else len(open_tokens(path, self.data.token_dtype))
            step = max(1, count * BLOCK_BYTES // max(size, 1))
            for start in range(0, count, step):
                end = min(start + step, count)
                yield Piece(str(path), name, start, end), size * (end - start) // count
        else:
            yield Piece(str(path), name), size


def kind_of(name: str, data: DataConfig) -> str:
    """Returns how a file is read, "jsonl", "parquet", "tokens" or "text", or "" when it is not.

    Rows of examples are only in JSONL and Parquet files. Where the corpus is tokens, other files are not read.
    """
    if data.token_separator >= 0:
        return "tokens" if is_token_file(name) else ""
    if is_jsonl(name) or is_parquet(name):
        return "jsonl" if is_jsonl(name) else "parquet"
    return "text" if data.format == "text" else ""


def blocks_of(unit: Unit) -> Iterator[Block]:
    """Yields the blocks of a unit: the unit itself, or the blocks of a stream, with their content, as it is read."""
    if not unit.is_stream:
        yield Block(unit.number, 0, True, unit.pieces, unit.size, unit.splits)
        return
    piece, part, lines = unit.pieces[0], 0, 0
    path = path_of(piece.path)
    try:
        with path.open("rb") as raw, open_bytes(path, raw) as file:
            data, before = _read_block(file, path), 0
            while data or part == 0:
                after = raw.tell()
                following = _read_block(file, path)
                content = piece._replace(data=data, lines_before=lines)
                yield Block(unit.number, part, not following, (content,), after - before, unit.splits)
                lines, part, before, data = lines + data.count(b"\n"), part + 1, after, following
    except READ_ERRORS as error:
        raise unreadable(path, error) from None


def _read_block(file: Any, path: Path) -> bytes:
    return file.read(BLOCK_BYTES) + read_line(file, path)


def list_corpus(config: DataConfig, key: str = "corpus") -> Corpus:
    """Lists the files of config.corpus. Raises UserError, naming config.data.KEY, when there is nothing to read."""
    named = f"config.data.{key} {config.corpus!r}"
    if config.corpus == "python":
        return _list_folder(named, Path(sysconfig.get_paths()["stdlib"]), "**/*.py", _SKIPPED_FOLDERS, config)
    path = path_of(config.corpus, f"config.data.{key}")
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
        size = path.stat().st_size if is_file else 0
    except OSError as error:  # such as a name of more than 255 bytes
        raise UserError(f"{named} cannot be read: {error.strerror}") from None
    if config.corpus and is_folder:
        if not config.file_pattern or Path(config.file_pattern).is_absolute():
            raise UserError(f'config.data.file_pattern must be relative, such as "**/*.txt": {config.file_pattern!r}')
        return _list_folder(named, path, config.file_pattern, set(), config)
    if is_file and kind_of(path.name, config):
        return Corpus(named, "", ((str(path), size),), config, Skipped())
    wanted = "an .npy or .bin file" if config.token_separator >= 0 else "a .jsonl (.gz, .zst) or .parquet file"
    raise UserError(f'{named} is neither "python", nor a folder, nor {wanted}')


def _list_folder(named: str, root: Path, pattern: str, left_out: set[str], config: DataConfig) -> Corpus:
    """Lists the files of a folder. named: as of `Corpus`. left_out: names of folders that are not read."""
    files, skipped = [], Skipped()
    if not in_bucket(root) and not os.access(root, os.R_OK | os.X_OK):
        raise UserError(f"{named} cannot be read: {os.strerror(errno.EACCES)}")
    if kind := kind_of_folder(root):
        raise UserError(f"{named} is {kind} of lsjax: name a folder that holds the texts alone")
    try:
        own_folder, own = own_folder_finder(root), {}
        for name, size in _matching(root, pattern):
            relative = PurePosixPath(name)
            if any(part.startswith(".") or part in left_out for part in relative.parts):
                continue
            if found := own_folder(relative):
                own |= [found]
            elif isinstance(size, str):
                skipped.add_file(name, size)
            elif kind_of(relative.name, config):
                files.append((name, size))
            else:
                skipped.add_file(name, "another kind of file")
    except (ValueError, NotImplementedError, IndexError) as error:
        raise UserError(f"config.data.file_pattern {pattern!r} is no pattern: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {error.filename or root}: {error.strerror}") from None
    for name, kind in own.items():
        if kind != UNFINISHED:  # which may be this preparation: the counts must not depend on when it was interrupted
            skipped.add_file(name, kind)
    return Corpus(named, str(root), tuple(sorted(files)), config, skipped)


def _matching(root: Path, pattern: str) -> Iterator[tuple[str, int | str]]:
    """Yields the name of each file that matches, with its size, or with the reason why it cannot be read."""
    if in_bucket(root):
        yield from ((name, found.size) for name, found in root.objects(pattern).items())
        return
    for path in root.glob(pattern):
        name = path.relative_to(root).as_posix()
        if path.is_file():
            yield name, path.stat().st_size
        elif not path.is_dir():
            yield name, "a pipe or a device" if path.exists() else "a link to nothing"
        elif path.is_symlink():
            yield name, "a link to a folder"
        elif not os.access(path, os.R_OK | os.X_OK):  # glob passes over it silently
            yield name, "a folder that may not be read"


def _shown(name: str) -> str:
    # A file name need not be UTF-8; Python keeps its bytes as surrogates.
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _reasons(counts: Counter) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items()))
