"""The choices of "auto": exit layers, draft lengths, the weights that draft, and draft vocabularies."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

from lsjax.decoding.model import Model
from lsjax.decoding.strategies import (
    INT8,
    DraftVocabulary,
    SelfSpeculative,
    check_strategy,
    is_choice_left,
)
from lsjax.errors import UserError, shown
from lsjax.io.draft_vocabulary import has_list, list_path, read_list

_LONGEST_DRAFT = 12

Vocabulary = DraftVocabulary | None
DraftWeights = Literal["int8"] | None


class Drafter(NamedTuple):
    """The source of drafts, apart from the exit layer; both fields as in SelfSpeculative."""

    draft_weights: DraftWeights = None
    draft_vocabulary: Vocabulary = None

    def strategy(self, exit_layer: int, num_speculations: int) -> SelfSpeculative:
        """Returns the strategy that drafts so."""
        return SelfSpeculative(exit_layer, num_speculations, **self._asdict())


class Choices(NamedTuple):
    """The settings to choose among: each exit layer with each draft length, drafted with each drafter.

    draft_weights, draft_vocabularies: their combinations are the drafters. The first of each is the one whose rounds
      are measured most.
    """

    exit_layers: Sequence[int]
    num_speculations: Sequence[int]
    draft_weights: Sequence[DraftWeights] = (None,)
    draft_vocabularies: Sequence[Vocabulary] = (None,)

    @property
    def drafters(self) -> list[Drafter]:
        """The weights that draft, each with every draft vocabulary."""
        return [Drafter(*pair) for pair in itertools.product(self.draft_weights, self.draft_vocabularies)]


def choices_of(strategy: SelfSpeculative, model: Model) -> Choices:
    """Returns what a strategy leaves to choose. Raises UserError when it leaves it for no reason, or says nonsense."""
    exit_layers, num_speculations = candidates(strategy, model.config.num_layers)
    return Choices(exit_layers, num_speculations, draft_weights(strategy, model), vocabularies(strategy, model))


def candidates(strategy: SelfSpeculative, num_layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns (exit layers, draft lengths) to choose from.

    Exits in the last quarter of the layers are left out, since verifying from there saves too little.
    """
    if not isinstance(strategy, SelfSpeculative):
        raise UserError(
            f'strategy must be SelfSpeculative(...), such as SelfSpeculative("auto", "auto"), got {shown(strategy)}'
        )
    exit_layer, drafts = strategy.exit_layer, strategy.num_speculations
    numbers = [1 if is_choice_left(value) else value for value in (exit_layer, drafts)]
    check_strategy(dataclasses.replace(strategy, exit_layer=numbers[0], num_speculations=numbers[1]), num_layers)
    if strategy.lookup:
        raise UserError('"auto" does not measure lookup: tune without it, then add it to the strategy found')
    exits = (exit_layer,) if isinstance(exit_layer, int) else range(1, max(1, 3 * num_layers // 4) + 1)
    lengths = (drafts,) if isinstance(drafts, int) else range(1, _LONGEST_DRAFT + 1)
    return tuple(exits), tuple(lengths)


def draft_weights(strategy: SelfSpeculative, model: Model) -> tuple[DraftWeights, ...]:
    """Returns the weights to draft with: the given ones, or the model's own and, unless that is int8, int8 too.

    Raises UserError for drafts in int8 of a model that is in int8 already.
    """
    if strategy.draft_weights is None:
        return (None,) if model.in_int8 else (None, INT8)
    model.check_int8_drafts()
    return (strategy.draft_weights,)


def vocabularies(strategy: SelfSpeculative, model: Model) -> tuple[Vocabulary, ...]:
    """Returns the draft vocabularies to choose from: the given one, or all tokens and parts of the model's list.

    The parts are the largest power of two up to a third of the vocabulary, and half of that.
    """
    if strategy.draft_vocabulary is not None:
        return (strategy.draft_vocabulary,)
    vocab_size = model.config.vocab_size
    if not has_list(model.path):
        return (None,)
    listed = len(read_list(list_path(model.path), vocab_size))
    largest = 1 << (max(1, vocab_size // 3).bit_length() - 1)
    return (None, *(size for size in (largest, largest // 2) if 0 < size <= listed))
