"""Prepares a corpus for training: tokenizes and packs it once, in any number of steps and on any number of hosts.

While it is prepared, the data is in a folder of its own beside its destination; in a bucket, which renames no folders,
in the destination itself, where the manifest comes last and makes it complete. Whatever interrupts a preparation, the
blocks that are done stay there, and the same command goes on. The bytes of the result depend on the corpus and the
configuration alone.
"""

import dataclasses
import json
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lsjax.config import Config, DataConfig
from lsjax.data.corpus import BLOCK_BYTES, Block, Corpus, Skipped, Unit, blocks_of
from lsjax.data.documents import digest_of, is_held_out, read_documents
from lsjax.data.examples import plain_text
from lsjax.data.packed import MANIFEST, check_records, damaged_data, read_manifest
from lsjax.data.packing import Job
from lsjax.data.parts import Part, is_complete, read_parts, total
from lsjax.data.pool import core_count, open_tokenizer, pack_blocks
from lsjax.data.progress import PrepareProgress
from lsjax.data.sources import Sources, list_sources, mixture_sources
from lsjax.data.tokenizer import GENERATION, SETTINGS, TOKENIZER, Tokenizer, train_tokenizer
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.errors import UserError
from lsjax.files import in_bucket, make_folder, path_of, read_json, remove, write_atomically

if TYPE_CHECKING:
    from lsjax.buckets import BucketPath

TRAIN_PREPARES_BYTES = 1_000_000_000  # the largest corpus that `train` prepares by itself
SAMPLE_BYTES = 32 << 20  # the most text that a tokenizer is trained on
_SAMPLED_UNITS = 64
_REQUEST, _TOKENIZER = "request.json", "tokenizer"  # a file and a folder of an unfinished preparation

Note = Callable[[str], None]


class Shard(NamedTuple):
    """One job of several that prepare a corpus together: number `index`, from 1, of `count`."""

    index: int = 1
    count: int = 1


def prepare(
    config: Config,
    directory: Path,
    note: Note = print,
    given: Tokenizer | None = None,
    *,
    most_bytes: int | None = None,
    workers: int | None = None,
) -> tuple[Tokenizer, dict]:
    """Writes the tokenizer and the packed splits of a run into `directory`, unless they are there already.

    note: receives each line about the corpus, to show it.
    given: the initial model's tokenizer, used unless config.data.tokenizer names another.
    most_bytes: a larger corpus is refused with the advice to run `lsjax prepare` first.
    workers: processes that pack; None means one per core where the corpus is large enough.

    Returns (tokenizer, manifest). The folder appears whole or not at all. Raises UserError when it holds something
    else, or when there is too little text.
    """
    manifest = _existing(config, directory, given)
    if manifest is None:
        sources = list_sources(config.data)
        if most_bytes is not None and sources.size > most_bytes:
            raise UserError(
                f"{_named(config.data)} has {sources.size:,} bytes, more than the {most_bytes:,} that train prepares "
                "by itself; run `lsjax prepare` first, with the same --config and --workdir"
            )
        prepare_shard(config, directory, Shard(), note, given, sources=sources, workers=workers)
        manifest = _existing(config, directory, given)
        assert manifest is not None, "one shard of one completes the folder"
    _describe(manifest, note)
    return load_tokenizer(directory), manifest


def prepare_shard(
    config: Config,
    directory: Path,
    shard: Shard,
    note: Note = print,
    given: Tokenizer | None = None,
    *,
    sources: Sources | None = None,
    workers: int | None = None,
) -> bool:
    """Packs one shard of a corpus; the shard that finds all others done also completes `directory`.

    Returns whether the folder is complete. Other arguments and errors are those of `prepare`.
    """
    if _existing(config, directory, given) is not None:
        return True
    folder = directory if in_bucket(directory) else directory.with_name(f"{directory.name}.partial")
    if _holds_something_else(directory):
        raise UserError(f"data folder {directory} exists and holds something else; choose another")
    sources = list_sources(config.data) if sources is None else sources
    try:
        _open_folder(folder, config, sources)
        _make_tokenizer(folder, config, sources.training, given)
        _pack(folder, config, sources, shard, workers, note)
        return _complete(folder, directory, config, sources)
    except UserError:
        if (folder == directory or not folder.exists()) and _existing(config, directory, given) is not None:
            return True  # another job completed it meanwhile
        if shard.count == 1 and not any(folder.glob("part-*.json")):
            remove(folder)  # bad input leaves nothing behind
        raise


def _holds_something_else(directory: Path) -> bool:
    """Returns whether a folder without complete data holds anything but, in a bucket, an unfinished preparation."""
    if in_bucket(directory):
        return any(directory.iterdir()) and not (directory / _REQUEST).exists()
    return directory.exists() and (not directory.is_dir() or any(directory.iterdir()))


def _existing(config: Config, directory: Path, given: Tokenizer | None) -> dict | None:
    """Returns the manifest of complete data. Raises UserError when it was packed for another configuration.

    given: the initial model's tokenizer, the only part of that model that the data depends on.
    """
    manifest, request = read_manifest(directory), _request(config)
    if manifest is None:
        return None
    found = _with_defaults(manifest["request"])
    if found != request and found | {"initial_model": config.initial_model} == request:  # that model may have moved
        unused = bool(config.data.tokenizer)
        if unused or (given is not None and given.files() == load_tokenizer(directory).files()):
            return manifest
    if found != request:
        raise UserError(
            f"{directory} holds data packed for {manifest['request']}, not {request}; remove it or set "
            "config.data.directory to another folder"
        )
    return manifest


def _named(data: DataConfig) -> str:
    return f"config.data.mixture {data.mixture!r}" if data.mixture else f"config.data.corpus {data.corpus!r}"


def _describe(manifest: dict, note: Note) -> None:
    corpus = manifest["corpus"]
    note(f"corpus: {corpus['documents']} documents, {corpus['bytes']:,} bytes, sha256 {corpus['sha256']}")
    for split, counts in manifest["splits"].items():
        filled = counts["tokens"] + counts.get("padding", 0)
        padding = f", {counts['padding'] / filled:.2%} padding" if counts.get("padding") else ""
        cut = f", {counts['cut']} cut because they are longer than a sequence" if counts.get("cut") else ""
        note(f"{split}: {counts['documents']} documents, {counts['tokens']:,} tokens{padding}{cut}")
    for line in Skipped(manifest.get("skipped")).describe():
        note(f"corpus: {line}")


def _request(config: Config) -> dict:
    """Returns the settings that, with the text, determine the packed bytes: the weights of a mixture do not."""
    data = dataclasses.asdict(config.data)
    del data["directory"]
    if config.data.mixture:
        sources = mixture_sources(config.data.mixture)
        data |= {"corpus": "", "mixture": ",".join(f"{name}={source.path}" for name, source in sources.items())}
    return data | {
        "initial_model": config.initial_model,
        "vocab_size": config.model.vocab_size,
        "sequence_length": config.training.sequence_length,
    }


def _with_defaults(request: dict) -> dict:
    """Completes the request of an earlier version, which had fewer keys."""
    defaults = dataclasses.asdict(DataConfig())
    del defaults["directory"]
    return defaults | request


def _open_folder(folder: Path, config: Config, sources: Sources) -> None:
    """Creates the folder of a preparation, or checks that it is of this corpus and configuration."""
    make_folder(folder, "data folder")
    request: dict[str, Any] = {"request": _request(config), "files": [corpus.identity() for corpus in sources]}
    path = folder / _REQUEST
    if not path.exists():
        write_atomically(path, json.dumps(request, indent=2))
    found = read_json(path)
    if found != json.loads(json.dumps(request)):
        what = "configuration" if found.get("files") == request["files"] else "corpus"
        raise UserError(f"{folder} is the unfinished preparation of another {what}; remove it to begin anew")


def _make_tokenizer(folder: Path, config: Config, corpora: Sequence[Corpus], given: Tokenizer | None) -> None:
    """Writes the tokenizer unless it is there. Of several jobs that do so at once, the first one's stays."""
    target = folder / _TOKENIZER
    if (target / TOKENIZER).exists():
        return
    if config.data.token_separator >= 0 and given is None and not config.data.tokenizer:
        raise UserError("a corpus of tokens needs the tokenizer that made them: set config.data.tokenizer")
    if config.data.tokenizer:
        tokenizer = load_tokenizer(path_of(config.data.tokenizer, "config.data.tokenizer"))
        tokenizer.restrict_to(config.model.vocab_size, f"config.data.tokenizer {config.data.tokenizer}")
    else:
        texts = (text for corpus in corpora for text in _sample(config.data, corpus, SAMPLE_BYTES // len(corpora)))
        tokenizer = given or _train_tokenizer(texts, config.model.vocab_size)
    if in_bucket(target):
        _save_first(tokenizer, target)
        return
    scratch = folder / f".{_TOKENIZER}.{secrets.token_hex(4)}"
    scratch.mkdir()
    tokenizer.save(scratch)
    try:
        scratch.rename(target)
    except OSError:  # another job was faster
        shutil.rmtree(scratch)


def _save_first(tokenizer: Tokenizer, target: "BucketPath") -> None:
    """Saves a tokenizer in a bucket, where the vocabulary of the first job stays.

    All jobs write the other files alike.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save(Path(scratch))
        try:
            for name in (GENERATION, SETTINGS):
                (target / name).write_bytes((Path(scratch) / name).read_bytes())
            (target / TOKENIZER).write_bytes((Path(scratch) / TOKENIZER).read_bytes(), new=True)
        except FileExistsError:  # another job was faster
            pass
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror}") from None


def _train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a tokenizer in a thread, so that a signal ends this one at once: training looks at signals at its end."""
    future: Future[Tokenizer] = Future()

    def run() -> None:
        try:
            future.set_result(train_tokenizer(texts, vocab_size))
        except BaseException as error:  # it is raised below
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result()


def _sample(data: DataConfig, corpus: Corpus, most: int) -> Iterator[str]:
    """Yields training documents for a tokenizer: all of a small corpus, else the beginnings of units spread evenly.

    most: bytes of a small corpus, and about the most that are taken from another.
    """
    stride, quota = 1, most
    if corpus.size > most:
        count = sum(1 for _ in corpus.units())
        stride = -(-count // _SAMPLED_UNITS)
        quota = most // -(-count // stride)
    for unit in islice(corpus.units(), 0, None, stride):
        taken = 0
        for document in read_documents(unit.pieces, data, Skipped()):
            if is_held_out(digest_of(document.content()), data.held_out_fraction):
                continue
            yield document.text if document.row is None else plain_text(document.row)
            taken += len(document.text)
            if taken >= quota:
                break


def _pack(folder: Path, config: Config, sources: Sources, shard: Shard, workers: int | None, note: Note) -> None:
    """Packs those blocks of a shard that are not done."""
    done = read_parts(folder)
    size, missing = 0, {}
    for unit in _units(sources, shard):
        size += unit.size
        if not is_complete(done.get(unit.number, {})):
            missing[unit.number] = unit.size
    progress = PrepareProgress(size, note)
    progress.skip(size - sum(missing.values()))
    if workers is None:
        workers = 1 if sources.size <= BLOCK_BYTES else core_count()
    job = Job(str(folder), config.data, config.training.sequence_length, config.model.vocab_size)
    pack_blocks(
        _missing_blocks(sources, shard, missing, done),
        job,
        tokenizer=folder / _TOKENIZER,
        workers=workers,
        report=lambda block, part: progress.add(block.size, part.size),
    )
    progress.close()


def _units(sources: Sources, shard: Shard) -> Iterator[Unit]:
    return (unit for unit in sources.units() if unit.number % shard.count == shard.index - 1)


def _missing_blocks(
    sources: Sources, shard: Shard, missing: Container[int], done: dict[int, dict[int, Part]]
) -> Iterator[Block]:
    for unit in _units(sources, shard):
        if unit.number in missing:
            for block in blocks_of(unit):
                if block.part not in done.get(unit.number, {}):
                    yield block


def _complete(folder: Path, directory: Path, config: Config, sources: Sources) -> bool:
    """Checks that all blocks are done and moves the folder to its destination.

    Returns False when blocks of other shards are missing.
    """
    done = read_parts(folder)
    units = [unit.number for unit in sources.units()]
    if not all(is_complete(done.get(number, {})) for number in units):
        return False
    manifest = total(done[number][part] for number in units for part in sorted(done[number]))
    manifest["skipped"] = _all_skipped(sources, manifest["skipped"])
    for counts in manifest["splits"].values():
        counts["tokens"] = counts["sequences"] * config.training.sequence_length - counts["padding"]
    try:
        _check_splits(manifest, config, sources)
    except UserError:
        remove(folder)
        raise
    _check_files(folder, manifest["files"])
    try:
        open_tokenizer(folder / _TOKENIZER, config.model.vocab_size).save(folder)
        write_atomically(folder / MANIFEST, json.dumps({"request": _request(config)} | manifest, indent=2))
        if folder != directory:
            folder.rename(directory)
    except OSError as error:
        raise UserError(f"cannot write data folder {directory}: {error.strerror or error}") from None
    _tidy(directory, manifest)
    return True


def _check_files(folder: Path, files: dict[str, dict[str, int]]) -> None:
    """Raises UserError when a file of records is damaged; in a bucket, when it is not there.

    The store has checked what was uploaded, and a run checks the number of records when it has copied a file.
    """
    if not in_bucket(folder):
        check_records(folder, files)
        return
    found = folder.objects("*.arrayrecord")
    for name in (name for counts in files.values() for name in counts):
        if name not in found:
            raise damaged_data(folder / name, "it is missing")


def _all_skipped(sources: Sources, packed: dict) -> dict:
    skipped = Skipped()
    for tree in (*(corpus.skipped.to_dict() for corpus in sources), packed):
        skipped.merge(tree)
    return skipped.to_dict()


def _check_splits(manifest: dict, config: Config, sources: Sources) -> None:
    """Raises UserError when a split is empty or shorter than one sequence."""
    for corpus in sources:
        counts = [manifest["splits"].get(split, {}).get("documents", 0) for split in corpus.splits]
        if not any(counts):
            left_out = "".join(f"; {line}" for line in Skipped(manifest["skipped"]).describe())
            raise UserError(f"{corpus.named} is empty: no UTF-8 text matches {config.data.file_pattern!r}{left_out}")
        if not all(counts):
            train, held_out = counts
            raise UserError(
                f"{corpus.named} has {train + held_out} document(s), too few to split: {train} to train, {held_out} "
                "held out; change config.data.held_out_fraction"
            )
    length = config.training.sequence_length
    for split, counts in manifest["splits"].items():
        if counts["tokens"] < length:
            raise UserError(
                f"the {split} documents are shorter than one sequence of {length} tokens; lower "
                "config.training.sequence_length or give more text"
            )


def _tidy(directory: Path, manifest: dict) -> None:
    """Removes what only the preparation needed. Killed before the end, it leaves files that nobody reads."""
    wanted = {MANIFEST, TOKENIZER, SETTINGS, GENERATION, *(name for f in manifest["files"].values() for name in f)}
    for path in directory.iterdir():
        if path.name not in wanted:
            remove(path)
