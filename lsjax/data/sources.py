"""Lists all text of a run: its corpus, or the sources of a mixture, and the sets that it is evaluated on."""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import NamedTuple

from lsjax.config import DataConfig
from lsjax.data.corpus import HELD_OUT, TRAIN, Corpus, Unit, list_corpus
from lsjax.errors import UserError
from lsjax.files import in_bucket, path_of

_WEIGHT = re.compile(r"\d{1,18}(\.\d{0,18})?|\.\d{1,18}", re.ASCII)


class Source(NamedTuple):
    """One source of config.data.mixture. weight: positive; its share is that of the sum of all weights."""

    path: str
    weight: Fraction


def mixture_sources(text: str) -> dict[str, Source]:
    """Returns the sources of config.data.mixture by name. Raises UserError that names the entry that is none."""
    sources, form = {}, "NAME=PATH:WEIGHT for each source"
    for name, value in _entries("mixture", text, form).items():
        path, _, weight = value.rpartition(":")
        if not path:
            raise UserError(f"config.data.mixture must be {form}, such as code=my/code:0.7; got {name}={value}")
        if not _WEIGHT.fullmatch(weight) or Fraction(weight) == 0:
            raise UserError(f"config.data.mixture: the weight of {name} must be a number above 0, got {weight!r}")
        sources[name] = Source(path, Fraction(weight))
    return sources


def validation_sets(text: str) -> dict[str, str]:
    """Returns the path of each set in config.data.validation by its name; one without a name is "held_out"."""
    if text and "=" not in text:
        return {HELD_OUT: text}
    return _entries("validation", text, "a path, or NAME=PATH for each of several sets")


def _entries(key: str, text: str, form: str) -> dict[str, str]:
    """Returns the values of NAME=VALUE, separated by commas, by name. key, form: for the message."""
    found: dict[str, str] = {}
    for entry in text.split(",") if text else ():
        name, _, value = entry.partition("=")
        if not re.fullmatch(r"\w+", name, re.ASCII) or not value or name in found or name == TRAIN:
            raise UserError(
                f"config.data.{key} must be {form}, separated by commas, each name once and not {TRAIN!r}; got {text!r}"
            )
        found[name] = value
    return found


def train_split(source: str) -> str:
    """Returns the split of the sequences of a source of config.data.mixture that are trained on."""
    return f"{TRAIN}-{source}"  # no name of a set contains a hyphen


def is_train_split(split: str) -> bool:
    """Returns whether a split is trained on: that of a corpus, or of a source of a mixture."""
    return split == TRAIN or split.startswith(f"{TRAIN}-")


def held_out_names(data: DataConfig) -> tuple[str, ...]:
    """Returns the splits that a run is evaluated on: its validation sets, a part of each source, or "held_out"."""
    return tuple(validation_sets(data.validation) or mixture_sources(data.mixture)) or (HELD_OUT,)


class Sources(tuple[Corpus, ...]):
    """All text of a run: the corpus, or each source of a mixture, then each set of config.data.validation."""

    __slots__ = ()

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(corpus.size for corpus in self)

    @property
    def training(self) -> list[Corpus]:
        """The text that is trained on, with what is held out from it."""
        return [corpus for corpus in self if is_train_split(corpus.splits[0])]

    def units(self) -> Iterator[Unit]:
        """Yields the units of all, numbered in one row."""
        number = 0
        for corpus in self:
            for unit in corpus.units(number):
                yield unit
                number = unit.number + 1


def list_sources(data: DataConfig) -> Sources:
    """Lists the files of a run. Raises UserError as `training_corpora` does."""
    held_out = [
        dataclasses.replace(_list(data, "validation", name, path), splits=(name,))
        for name, path in validation_sets(data.validation).items()
    ]
    return Sources([*training_corpora(data), *held_out])


def training_corpora(data: DataConfig) -> list[Corpus]:
    """Lists the files of the corpus, or of each source of the mixture.

    Raises UserError when there is nothing to read, or when a file belongs to two sources.
    """
    sources = mixture_sources(data.mixture)
    corpora = {name: _list(data, "mixture", name, source.path) for name, source in sources.items()}
    _check_apart(corpora)
    found = [dataclasses.replace(corpus, splits=(train_split(name), name)) for name, corpus in corpora.items()]
    found = found or [list_corpus(data)]
    return [dataclasses.replace(c, splits=c.splits[:1]) if data.validation else c for c in found]


def _list(data: DataConfig, key: str, name: str, path: str) -> Corpus:
    corpus = list_corpus(dataclasses.replace(data, corpus=path), key)
    return dataclasses.replace(corpus, named=f"config.data.{key}: {name}")


def _check_apart(corpora: Mapping[str, Corpus]) -> None:
    """Raises UserError when two sources hold the same file."""
    owners: dict[str, str] = {}
    for name, corpus in corpora.items():
        root = _without_links(corpus.root)
        for file, _ in corpus.files:
            path = os.path.join(root, file) if corpus.root else _without_links(file)
            if owners.setdefault(path, name) != name:
                raise UserError(
                    f"config.data.mixture: {owners[path]} and {name} both hold {path}; a file belongs to one source"
                )


def _without_links(path: str) -> str:
    return path if in_bucket(path_of(path)) else os.path.realpath(path)
