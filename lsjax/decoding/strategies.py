"""How to decode: the three strategies, as values."""

import dataclasses
import math
import numbers
from typing import Literal

from lsjax.errors import UserError

MAX_SPECULATIONS = 64
AUTO = "auto"
INT8 = "int8"
_LEAST_TEMPERATURE = 1e-6  # below it, float32 logits over temperature would in the end be infinite


@dataclasses.dataclass(frozen=True)
class Autoregressive:
    """One token a pass, through all layers."""

    name = "autoregressive"


@dataclasses.dataclass(frozen=True)
class EarlyExit:
    """One token a pass, through the first `exit_layer` layers only. Fast; the text is the early exit's own."""

    exit_layer: int
    name = "early_exit"


@dataclasses.dataclass(frozen=True)
class SelfSpeculative:
    """The first `exit_layer` layers draft `num_speculations` tokens, the rest verify them in one pass.

    "auto", for either or both, leaves the choice to what is measured on the prompts at hand (lsjax/decoding/tuning.py).
    draft_weights="int8": drafts by an int8 copy of the early layers and the head, and all layers verify, in full
    precision; what the drafts left in the cache is overwritten, so the result is still the full model's.
    lookup: where a text repeats itself, that many drafts are copied from it instead (prompt lookup), which all layers
    verify in one pass; num_speculations may then be 0, for a model whose early layers draft badly. 0: no copies.
    """

    exit_layer: int | Literal["auto"]
    num_speculations: int | Literal["auto"]
    draft_weights: Literal["int8"] | None = None
    lookup: int = 0
    name = "self_speculative"


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: the likeliest one (temperature 0), or from what temperature, top_k (0: all) and top_p
    leave, applied in this order to drafts and verification alike."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


Strategy = Autoregressive | EarlyExit | SelfSpeculative


def check_strategy(strategy: Strategy, num_layers: int) -> None:
    """Raises UserError when the exit layer or the draft length is no number, or out of range."""
    lookup = getattr(strategy, "lookup", 0)
    if not isinstance(lookup, numbers.Integral) or not 0 <= lookup <= MAX_SPECULATIONS:
        raise UserError(f"lookup must be a number in 0..{MAX_SPECULATIONS}, got {lookup!r}")
    for key in ("exit_layer", "num_speculations"):
        value = getattr(strategy, key, 1)
        if not isinstance(value, numbers.Integral):
            raise UserError(f'{key} must be a number, or "auto" for self-speculation that is tuned, got {value!r}')
    exit_layer = getattr(strategy, "exit_layer", num_layers)
    if not 1 <= exit_layer <= num_layers:
        raise UserError(f"exit_layer {exit_layer} is out of range: this model has layers 1..{num_layers}")
    drafted = getattr(strategy, "num_speculations", 1)
    least = 0 if lookup else 1
    if not least <= drafted <= MAX_SPECULATIONS:
        raise UserError(f"num_speculations {drafted} is out of range {least}..{MAX_SPECULATIONS}")
    drafting = getattr(strategy, "draft_weights", None)
    if drafting not in (None, INT8):
        raise UserError(f'draft_weights must be "{INT8}", or None for the model\'s own, got {drafting!r}')
    if drafting and not drafted:
        raise UserError("draft_weights is of drafts: with num_speculations=0 there are none")


def label(strategy: Strategy) -> str:
    """Its name and settings, for people."""
    exit_layer = getattr(strategy, "exit_layer", None)
    drafts, lookup = (getattr(strategy, key, 0) for key in ("num_speculations", "lookup"))
    in_int8 = " in int8" if getattr(strategy, "draft_weights", None) else ""
    parts = [f"exit layer {exit_layer}" if exit_layer else "", f"{drafts} drafts{in_int8}" if drafts else ""]
    parts.append(f"{lookup} copied" if lookup else "")
    return ", ".join([strategy.name, *(part for part in parts if part)])


def is_auto(strategy: Strategy) -> bool:
    """Whether something of it is still to be chosen."""
    return isinstance(strategy, SelfSpeculative) and AUTO in (strategy.exit_layer, strategy.num_speculations)


def check_sampling(sampling: Sampling) -> None:
    """Raises UserError when a setting is out of range, or would have no effect."""
    s = sampling
    if not (math.isfinite(s.temperature) and (s.temperature == 0 or s.temperature >= _LEAST_TEMPERATURE)):
        raise UserError(f"temperature must be 0 (greedy) or at least {_LEAST_TEMPERATURE}, got {s.temperature}")
    if s.top_k < 0:
        raise UserError(f"top_k must be 0 (all tokens) or positive, got {s.top_k}")
    if not 0 < s.top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1, got {s.top_p}")
    if s.temperature == 0 and (s.top_k or s.top_p < 1):
        raise UserError("top_k and top_p need a temperature above 0: at 0 decoding is greedy")


def most_drafts(strategy: Strategy) -> int:
    """How many drafts a round may have."""
    return max(strategy.num_speculations, strategy.lookup) if isinstance(strategy, SelfSpeculative) else 0


def lookahead(strategy: Strategy) -> int:
    """Cache entries past the last accepted token that a round may write."""
    return most_drafts(strategy) + 1
