"""How to decode: the three strategies, as values."""

import dataclasses

from lsjax.errors import UserError

MAX_SPECULATIONS = 64


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
    """The first `exit_layer` layers draft `num_speculations` tokens, the rest verify them in one pass."""

    exit_layer: int
    num_speculations: int
    name = "self_speculative"


Strategy = Autoregressive | EarlyExit | SelfSpeculative


def check_strategy(strategy: Strategy, num_layers: int) -> None:
    """Raises UserError when the exit layer or the draft length is out of range."""
    exit_layer = getattr(strategy, "exit_layer", num_layers)
    if not 1 <= exit_layer <= num_layers:
        raise UserError(f"exit_layer {exit_layer} is out of range: this model has layers 1..{num_layers}")
    drafted = getattr(strategy, "num_speculations", 1)
    if not 1 <= drafted <= MAX_SPECULATIONS:
        raise UserError(f"num_speculations {drafted} is out of range 1..{MAX_SPECULATIONS}")


def lookahead(strategy: Strategy) -> int:
    """Cache entries past the last accepted token that a round may write."""
    return strategy.num_speculations + 1 if isinstance(strategy, SelfSpeculative) else 1
