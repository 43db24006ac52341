"""Measured times of a round: at corners of the grid of settings, on the programs that decode.

A round takes d (early layers + head) + early layers + late layers for d+1 tokens + head. That is linear in the exit
layer and nearly linear in the draft length, so times are interpolated between the corners.
"""

import statistics
from collections.abc import Callable, Sequence

import numpy as np

from lsjax.decoding.batch import PromptBatch
from lsjax.decoding.model import Model
from lsjax.decoding.program import DecodeProgram
from lsjax.decoding.results import GenerateResult
from lsjax.decoding.strategies import Autoregressive, Strategy
from lsjax.tuning.choices import Choices, Drafter

_TIMED_TOKENS = 24
_REPEATS = 5

Times = dict[tuple[int, int], float]  # milliseconds of a round at pairs (exit layer, draft length)


def corner_times(
    model: Model, batch: PromptBatch, choices: Choices, note: Callable[[str], None]
) -> tuple[float, dict[Drafter, Times]]:
    """Returns (milliseconds of an autoregressive pass, those of a round at each corner for every drafter).

    The first drafter is timed at every corner. The others are timed at few places, because their programs differ from
    its programs in little else than the drafts:

    - Drafts of another vocabulary at the earliest exit with the most drafts, where the head is the largest part of a
      round. The vocabulary saves that time in each draft, whatever the exit layer.
    - Drafts in int8 at the earliest and at the latest exit with the most drafts (`_times_in_int8`).
    """
    corners = corners_of(choices.exit_layers, choices.num_speculations)
    timed = {drafter: _timed_at(drafter, choices, corners) for drafter in choices.drafters}
    strategies = [drafter.strategy(*pair) for drafter, pairs in timed.items() for pair in pairs]
    token_time, *round_times = round_times_of(model, batch, [Autoregressive(), *strategies], note)
    left = iter(round_times)
    measured = {drafter: {pair: next(left) for pair in pairs} for drafter, pairs in timed.items()}
    return token_time, _complete(measured, choices, corners)


def _timed_at(drafter: Drafter, choices: Choices, corners: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns the pairs (exit layer, draft length) at which rounds of a drafter are timed."""
    if drafter.draft_vocabulary != choices.draft_vocabularies[0]:
        return [_fewest_layers_most_drafts(choices)]
    if drafter.draft_weights == choices.draft_weights[0] or len(set(choices.exit_layers)) == 1:
        return corners
    return [pair for pair in corners if pair[1] == max(choices.num_speculations)]


def _complete(measured: dict[Drafter, Times], choices: Choices, corners: list[tuple[int, int]]) -> dict[Drafter, Times]:
    """Returns the times of every drafter at every corner, from those that were measured."""
    whole = choices.draft_vocabularies[0]
    first = measured[Drafter(choices.draft_weights[0], whole)]
    common = _fewest_layers_most_drafts(choices)
    times = {}
    for weights in choices.draft_weights:
        of_weights = measured[Drafter(weights, whole)]
        if len(of_weights) < len(corners):
            of_weights = _times_in_int8(first, of_weights)
        for vocabulary in choices.draft_vocabularies:
            drafter = Drafter(weights, vocabulary)
            saved_by_draft = (of_weights[common] - measured[drafter][common]) / common[1]
            times[drafter] = {(e, d): of_weights[e, d] - d * saved_by_draft for e, d in corners}
    return times


def _times_in_int8(own: Times, measured: Times) -> Times:
    """Returns the times of rounds with int8 drafts at every corner, from two of them.

    own: those of the model's own drafts at every corner, at two exit layers.
    measured: those of int8 drafts at the same exit layers, with the most drafts.

    Early layers in int8 do not share states with verification, which therefore runs all layers. That is what it does
    for own drafts at an exit layer of 0, where own times are extrapolated to. From there on only drafts add time: each
    the same, and linear in the exit layer.
    """
    (first, most), (last, _) = sorted(measured)
    times = {}
    for e, d in own:
        added = {end: (measured[end, most] - _at_exit_0(own, most)) / most for end in (first, last)}
        times[e, d] = _at_exit_0(own, d) + d * added[e]
    return times


def _at_exit_0(times: Times, num_speculations: int) -> float:
    """Extrapolates a time linearly to an exit layer of 0."""
    (first, early), (last, late) = sorted((e, time) for (e, d), time in times.items() if d == num_speculations)
    return early - first * (late - early) / (last - first)


def _fewest_layers_most_drafts(choices: Choices) -> tuple[int, int]:
    return min(choices.exit_layers), max(choices.num_speculations)


def corners_of(exit_layers: Sequence[int], num_speculations: Sequence[int]) -> list[tuple[int, int]]:
    """Returns the pairs (E, d) to measure: the ends of both, and one draft length between them.

    The time bends along the draft length, so that direction gets a third point.
    """
    drafts = sorted(num_speculations)
    return [
        (e, d)
        for e in sorted({min(exit_layers), max(exit_layers)})
        for d in sorted({drafts[0], drafts[len(drafts) // 3], drafts[-1]})
    ]


def interpolate(corner_times: Times, exit_layer: int, num_speculations: int) -> float:
    """Interpolates a time linearly along both, from times at every pair of some exit layers and draft lengths."""
    exits, drafts = (sorted(set(values)) for values in zip(*corner_times, strict=True))
    along = [np.interp(num_speculations, drafts, [corner_times[e, d] for d in drafts]) for e in exits]
    return float(np.interp(exit_layer, exits, along))


def round_times_of(
    model: Model, batch: PromptBatch, strategies: Sequence[Strategy], note: Callable[[str], None]
) -> list[float]:
    """Returns milliseconds per round of each strategy: medians of interleaved repeats, compilation left out."""
    programs = []
    for index, strategy in enumerate(strategies, 1):
        note(f"tuning: compiling {index}/{len(strategies)}")
        programs.append(compiled(model, strategy, batch))
        run(model, programs[-1], batch, _TIMED_TOKENS)
    note(f"tuning: timing {len(strategies)} settings")
    times = [[_round_time(run(model, program, batch, _TIMED_TOKENS)) for program in programs] for _ in range(_REPEATS)]
    # Ratios are taken within a repeat: what slows the machine for a while slows all settings.
    first = statistics.median(repeat[0] for repeat in times)
    return [first * statistics.median(repeat[i] / repeat[0] for repeat in times) for i in range(len(strategies))]


def _round_time(result: GenerateResult) -> float:
    """Returns milliseconds per round; all sequences share a round."""
    return 1e3 * result.stats[0]["seconds"] / result.stats[0]["batch_rounds"]


def compiled(model: Model, strategy: Strategy, batch: PromptBatch) -> DecodeProgram:
    """Returns the program of a strategy for a batch, compiled."""
    program = DecodeProgram(model.config, strategy, batch)
    program.compile(program.weights(model), model.kernels, model.cache)
    return program


def run(model: Model, program: DecodeProgram, batch: PromptBatch, tokens: int) -> GenerateResult:
    """Decodes a batch up to `tokens` new tokens per prompt."""
    return program.run(model, batch._replace(max_new_tokens=np.minimum(batch.max_new_tokens, tokens)))
