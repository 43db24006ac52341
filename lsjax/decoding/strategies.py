"""Decoding strategies and sampling settings, as values."""

import dataclasses
import numbers
import os
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast

from lsjax.checks import attribute_of, entries_of, length_of, require
from lsjax.decoding.per_prompt import freeze, is_per_prompt, named_values
from lsjax.errors import UserError, shown
from lsjax.files import path_text

MAX_SPECULATIONS = 64
SAMPLING_SETTINGS = ("temperature", "top_k", "top_p")
AUTO = "auto"
INT8 = "int8"
_LARGEST_VOCABULARY = 2**24  # tokens
_LEAST_TOP_P = 1e-30  # much smaller ones round to 0 in float32, which keeps no token
_LARGEST_TEMPERATURE = 1e30  # infinite in float32 above 3.4e38, which makes every logit 0 or not a number
_LEAST_TEMPERATURE = 1e-6  # below it, float32 logits divided by the temperature could become infinite


DraftVocabulary = int | Sequence[int] | str | os.PathLike[str]


class _Strategy:
    """The questions that every strategy answers. The defaults are those of decoding without drafts."""

    name: ClassVar[str]
    draft_weights: Any = None
    draft_vocabulary: Any = None
    lookup: Any = 0

    @property
    def max_drafts(self) -> int:
        """The most drafts of one round."""
        return 0

    @property
    def tokens_per_pass(self) -> int:
        """The most tokens in one pass, which is also the most cache entries that a round writes past the valid ones."""
        return self.max_drafts + 1

    def layers_run(self, num_layers: int) -> int:
        """Returns the number of layers that every emitted token passes through."""
        return num_layers

    def settings(self) -> dict[str, Any]:
        """Returns {setting: value}, the same keys for every strategy; None where a strategy has no such setting.

        Token ids of a draft vocabulary are given by their number.
        """
        names = ("exit_layer", "num_speculations", "draft_weights", "lookup", "draft_vocabulary")
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(cast(Any, self))}
        if isinstance(self.draft_vocabulary, tuple):
            values["draft_vocabulary"] = len(self.draft_vocabulary)
        return dict.fromkeys(names) | values


@dataclasses.dataclass(frozen=True)
class Autoregressive(_Strategy):
    """Decodes one token per pass through all layers."""

    name: ClassVar[str] = "autoregressive"


@dataclasses.dataclass(frozen=True)
class EarlyExit(_Strategy):
    """Decodes one token per pass through the first `exit_layer` layers only.

    Fast, but the text is that of the early exit, not of the full model.
    """

    exit_layer: int
    name: ClassVar[str] = "early_exit"

    def layers_run(self, num_layers: int) -> int:
        return self.exit_layer


@dataclasses.dataclass(frozen=True)
class SelfSpeculative(_Strategy):
    """Drafts with the first `exit_layer` layers and verifies with the rest, in one pass per round.

    exit_layer, num_speculations: "auto", for either or both, chooses by measuring on the prompts (lsjax.tuning). For
      both, it first looks for a table of tuned settings beside the model (`tune_table`).
    draft_weights: "int8" drafts with an int8 copy of the early layers and the head. All layers then verify in full
      precision and overwrite the drafts' cache entries, so the result is still the full model's.
    lookup: where the text repeats itself, copies this many drafts from it (prompt lookup); all layers verify them in
      one pass. num_speculations may then be 0, for a model whose early layers draft badly. 0 copies nothing.
    draft_vocabulary: drafts choose among these tokens only, so a draft reads only their rows of the head. A number k
      takes the k most frequent tokens of the list beside the model (`lsjax draft_vocabulary` makes it); otherwise
      token ids, or the path of a list. Stop tokens and special tokens always belong to it. Verification reads the
      whole head, so the result is still the full model's.
    """

    exit_layer: int | Literal["auto"]
    num_speculations: int | Literal["auto"]
    draft_weights: Literal["int8"] | None = None
    lookup: int = 0
    draft_vocabulary: DraftVocabulary | None = None
    name: ClassVar[str] = "self_speculative"

    def __post_init__(self):
        # Compiled programs are stored by strategy, so every setting must have a hash.
        object.__setattr__(self, "draft_vocabulary", _hashable_vocabulary(self.draft_vocabulary))

    @property
    def max_drafts(self) -> int:
        return max(int(self.num_speculations), self.lookup)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Says how tokens are drawn.

    temperature 0 takes the likeliest token. Otherwise tokens are drawn from what temperature, top_k (0: all tokens) and
    top_p leave, applied in this order, to drafts and verification alike. Each of the three is one value, or a list with
    one value per prompt.

    coupled: draft and verifier draw with the same noise, so that self-speculation gives the tokens of autoregressive
    sampling with the same seed, where otherwise it gives the same distribution. It keeps a few drafts fewer. Decoding
    without drafts is the same with and without.
    """

    temperature: float | Sequence[float] = 0.0
    top_k: int | Sequence[int] = 0
    top_p: float | Sequence[float] = 1.0
    coupled: bool = False

    def __post_init__(self):
        for name in SAMPLING_SETTINGS:
            object.__setattr__(self, name, freeze(name, getattr(self, name)))


Strategy = Autoregressive | EarlyExit | SelfSpeculative
AUTOREGRESSIVE, GREEDY = Autoregressive(), Sampling()


def check_strategy(strategy: Strategy, num_layers: int) -> None:
    """Raises UserError when a setting is of the wrong type or out of range for a model of `num_layers` layers."""
    if not isinstance(strategy, Strategy):
        raise UserError(
            f"strategy must be Autoregressive(), EarlyExit(...) or SelfSpeculative(...), got {shown(strategy)}"
        )
    lookup = strategy.lookup
    if isinstance(lookup, bool) or not isinstance(lookup, numbers.Integral) or not 0 <= int(lookup) <= MAX_SPECULATIONS:
        raise UserError(f"lookup must be a number in 0..{MAX_SPECULATIONS}, got {shown(lookup)}")
    settings = {field.name: getattr(strategy, field.name) for field in dataclasses.fields(strategy)}
    for key in ("exit_layer", "num_speculations"):
        value = settings.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise UserError(f'{key} must be a number, or "auto" for self-speculation that is tuned, got {shown(value)}')
    exit_layer = settings.get("exit_layer", num_layers)
    if not 1 <= exit_layer <= num_layers:
        raise UserError(f"exit_layer {shown(exit_layer)} is out of range: this model has layers 1..{num_layers}")
    drafted = settings.get("num_speculations", 1)
    least = 0 if lookup else 1
    if not least <= drafted <= MAX_SPECULATIONS:
        raise UserError(f"num_speculations {shown(drafted)} is out of range {least}..{MAX_SPECULATIONS}")
    drafter = strategy.draft_weights
    if drafter is not None and not (isinstance(drafter, str) and drafter == INT8):
        raise UserError(f'draft_weights must be "{INT8}", or None for the model\'s own, got {shown(drafter)}')
    for key in ("draft_weights", "draft_vocabulary"):
        if getattr(strategy, key) is not None and not drafted:
            raise UserError(f"{key} needs drafts: raise num_speculations above 0")
    _check_draft_vocabulary(strategy.draft_vocabulary)


def _check_draft_vocabulary(vocabulary: Any) -> None:
    """Raises UserError unless a draft vocabulary is None, a positive number, a path, or a tuple of whole numbers."""
    if vocabulary is None or (isinstance(vocabulary, str) and vocabulary):
        return
    if isinstance(vocabulary, tuple) and not vocabulary:
        raise UserError("draft_vocabulary is empty: give at least one token id, or leave it away")
    for value in vocabulary if isinstance(vocabulary, tuple) else (vocabulary,):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise UserError(f"draft_vocabulary must be a number, token ids or the path of a list, got {shown(value)}")
    if isinstance(vocabulary, int) and vocabulary < 1:
        raise UserError(f"draft_vocabulary must be at least 1 token, got {shown(vocabulary)}")


def _hashable_vocabulary(vocabulary: Any) -> Any:
    """Returns a path as a text, a number as an int, and a list or array of ids as a tuple; anything else as it is."""
    if isinstance(vocabulary, os.PathLike):
        return path_text(vocabulary, "draft_vocabulary")
    if isinstance(vocabulary, numbers.Integral) and not isinstance(vocabulary, bool):
        return int(vocabulary)
    is_array = attribute_of(vocabulary, "tolist") and attribute_of(vocabulary, "ndim", 1)
    is_array = is_array and not isinstance(vocabulary, type)
    if not is_array and not isinstance(vocabulary, list | tuple | range | set | frozenset):
        return vocabulary
    size = length_of(vocabulary, "draft_vocabulary")
    require(size <= _LARGEST_VOCABULARY, f"draft_vocabulary has {size} entries, more than any vocabulary")
    return tuple(entries_of(vocabulary, "draft_vocabulary"))


def vocabulary_label(settings: dict[str, Any]) -> str:
    """Returns the draft vocabulary in some settings or stats for people, such as "of 8192 ids"; empty without one."""
    vocabulary = settings.get("draft_vocabulary")
    if vocabulary is None:
        return ""
    return f"of the ids in {vocabulary}" if isinstance(vocabulary, str) else f"of {vocabulary} ids"


def drafts_label(settings: dict[str, Any], word: str = "drafts") -> str:
    """Returns the drafts of a round in some settings or stats for people, such as "4 drafts in int8 of 8192 ids"."""
    in_int8 = "in int8" if settings.get("draft_weights") else ""
    parts = [str(settings["num_speculations"]), word, in_int8, vocabulary_label(settings)]
    return " ".join(part for part in parts if part)


def label(strategy: Strategy) -> str:
    """Returns the strategy's name and settings for people, such as "self_speculative, exit layer 2, 4 drafts"."""
    settings = strategy.settings()
    parts = [
        strategy.name,
        f"exit layer {settings['exit_layer']}" if settings["exit_layer"] else "",
        drafts_label(settings) if settings["num_speculations"] else "",
        f"{strategy.lookup} copied" if strategy.lookup else "",
    ]
    return ", ".join(part for part in parts if part)


def is_auto(strategy: Strategy) -> bool:
    """Returns whether a setting is still to be chosen."""
    return isinstance(strategy, SelfSpeculative) and (
        is_choice_left(strategy.exit_layer) or is_choice_left(strategy.num_speculations)
    )


def is_choice_left(value: Any) -> bool:
    """Returns whether a setting is "auto"."""
    return isinstance(value, str) and value == AUTO


def check_sampling(sampling: Sampling) -> None:
    """Raises UserError when a setting is out of range or would have no effect."""
    if not isinstance(sampling, Sampling):  # the class itself has all the attributes, too
        raise UserError(f"sampling must be Sampling(...), got {shown(sampling)}")
    for setting, check in zip(SAMPLING_SETTINGS, (_check_temperature, _check_top_k, _check_top_p), strict=True):
        for name, value in named_values(setting, getattr(sampling, setting)):
            check(name, value)
    if not isinstance(sampling.coupled, bool):
        raise UserError(f"coupled must be True or False, got {shown(sampling.coupled)}")
    _check_filters_have_effect(sampling)


def _check_number(name: str, value: Any, kind: type) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        wanted = "a whole number" if kind is numbers.Integral else "a number"
        raise UserError(f"{name} must be {wanted}, got {shown(value)}")


def _check_temperature(name: str, value: Any) -> None:
    _check_number(name, value, numbers.Real)
    if not (value == 0 or _LEAST_TEMPERATURE <= value <= _LARGEST_TEMPERATURE):
        raise UserError(
            f"{name} must be 0 (greedy) or in {_LEAST_TEMPERATURE}..{_LARGEST_TEMPERATURE}, got {shown(value)}"
        )


def _check_top_k(name: str, value: Any) -> None:
    _check_number(name, value, numbers.Integral)
    if value < 0:
        raise UserError(f"{name} must be 0 (all tokens) or positive, got {shown(value)}")


def _check_top_p(name: str, value: Any) -> None:
    _check_number(name, value, numbers.Real)
    if not _LEAST_TOP_P <= value <= 1:
        raise UserError(f"{name} must be at least {_LEAST_TOP_P} and at most 1, got {shown(value)}")


def _check_filters_have_effect(sampling: Sampling) -> None:
    """Raises UserError for a top_k or top_p of greedy decoding.

    One value for all prompts need not have an effect on each of them.
    """
    greedy = [value == 0 for _, value in named_values("temperature", sampling.temperature)]
    for setting, all_tokens in (("top_k", 0), ("top_p", 1)):
        value = getattr(sampling, setting)
        filters = [part != all_tokens for _, part in named_values(setting, value)]
        if all(greedy) and any(filters):
            raise UserError("top_k and top_p need a temperature above 0: at 0 decoding is greedy")
        if is_per_prompt(sampling.temperature) and is_per_prompt(value):
            # Lists of another length than the prompts are refused later, with the prompts at hand.
            for index, (is_greedy, has_filter) in enumerate(zip(greedy, filters, strict=False)):
                if is_greedy and has_filter:
                    raise UserError(f"{setting}[{index}] needs temperature[{index}] above 0: at 0 decoding is greedy")
