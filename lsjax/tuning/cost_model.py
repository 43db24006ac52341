"""The cost model of self-speculation: what every exit layer and draft length would give, on some prompts and a device.

The speed-up of a setting is the tokens of a round (`decoded_batch`, from the acceptance of drafts on texts that were
decoded once) beside the time of a round (`round_times`).
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lsjax.decoding.batch import PromptBatch
from lsjax.decoding.model import Model
from lsjax.decoding.strategies import (
    Autoregressive,
    SelfSpeculative,
    Strategy,
    drafts_label,
    is_auto,
)
from lsjax.tuning.acceptance import expected_rounds
from lsjax.tuning.choices import Choices, Drafter, DraftWeights, Vocabulary, choices_of
from lsjax.tuning.decoded_batch import SAMPLE_TOKENS, DecodedBatch, read_batches
from lsjax.tuning.round_times import Times, compiled, corner_times, interpolate, run
from lsjax.tuning.tuned_settings import saved_strategy

_SAMPLE_BATCHES = 8


class Setting(NamedTuple):
    """Predicted figures of one setting. `speedup` is against autoregressive decoding, the median over batches.

    draft_vocabulary, draft_weights: as in SelfSpeculative.
    """

    exit_layer: int
    num_speculations: int
    tokens_per_round: float
    milliseconds_per_round: float
    speedup: float
    draft_vocabulary: Vocabulary = None
    draft_weights: DraftWeights = None

    @property
    def strategy(self) -> SelfSpeculative:
        """The setting, ready to use."""
        return Drafter(self.draft_weights, self.draft_vocabulary).strategy(self.exit_layer, self.num_speculations)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The predicted figures of every setting, and the fastest of them as a strategy.

    milliseconds_per_token: measured time of autoregressive decoding.
    """

    table: tuple[Setting, ...]
    milliseconds_per_token: float

    @property
    def best(self) -> Setting:
        """The setting with the highest predicted speed-up."""
        return max(self.table, key=lambda setting: setting.speedup)

    @property
    def strategy(self) -> SelfSpeculative:
        """The best setting, ready to use."""
        return self.best.strategy

    @property
    def predicted_speedup(self) -> float:
        """The speed-up of the best setting over autoregressive decoding."""
        return self.best.speedup

    @property
    def predicted_tokens_per_round(self) -> float:
        """The tokens per round of the best setting."""
        return self.best.tokens_per_round

    def at(self, strategy: Strategy) -> Setting | None:
        """Returns the prediction for a strategy, if it is in the table."""
        return next((setting for setting in self.table if setting.strategy == strategy), None)

    def __str__(self) -> str:
        best = self.best
        setting = f"exit layer {best.exit_layer} with {drafts_label(self.strategy.settings(), 'draft(s)')}"
        figures = f"{best.speedup:.2f} times autoregressive, {best.tokens_per_round:.2f} tokens per round"
        if best.speedup > 1:
            return f"{setting} is predicted to be the fastest: {figures}"
        return f"no setting is predicted to beat autoregressive; the best, {setting}: {figures}"


def resolve_auto(strategy: Strategy, model: Model, batch: PromptBatch) -> Strategy:
    """Returns the strategy with numbers in place of "auto"; autoregressive where nothing is predicted to be faster.

    A table of tuned settings beside the model saves the measuring.
    """
    if not is_auto(strategy):
        return strategy
    assert isinstance(strategy, SelfSpeculative)
    choices = choices_of(strategy, model)
    saved = saved_strategy(strategy, model, batch)
    if saved is not None:
        return saved
    tuning = measure_settings(model, [batch], choices)
    return tuning.strategy if tuning and tuning.predicted_speedup > 1 else Autoregressive()


def measure_settings(
    model: Model,
    batches: Sequence[PromptBatch],
    choices: Choices,
    note: Callable[[str], None] = lambda _: None,
) -> Tuning | None:
    """Predicts every exit layer with every draft length and drafter.

    Returns None when every text ends with its first token.

    Looks at the first tokens of each text. Of many batches it takes a few, spread evenly; of many prompts the first.
    note: receives one line of progress at a time.
    """
    chosen = range(0, len(batches), -(-len(batches) // _SAMPLE_BATCHES))
    batches = [batches[index].part(0, _SAMPLE_BATCHES * batches[index].batch_size) for index in chosen]
    note(f"tuning: decoding {len(batches)} batch(es) once, to see which exit agrees where")
    programs = [compiled(model, Autoregressive(), batch) for batch in batches]
    runs = [run(model, program, batch, SAMPLE_TOKENS) for program, batch in zip(programs, batches, strict=True)]
    new_tokens = [result.tokens for result in runs]
    longest = max(range(len(batches)), key=lambda index: max(map(len, new_tokens[index])))
    if max(map(len, new_tokens[longest])) == 1:
        return None
    with model.passing_draft_weights():
        texts = read_batches(model, batches, new_tokens, choices)
        token_time, times = corner_times(model, batches[longest], choices, note)
    table = [
        setting._replace(**drafter._asdict())
        for drafter in choices.drafters
        for setting in predict(
            texts[drafter], token_time, times[drafter], choices.exit_layers, choices.num_speculations
        )
    ]
    return Tuning(tuple(sorted(table, key=lambda setting: setting[:2])), token_time)


def predict(
    texts: Sequence[DecodedBatch],
    token_time: float,
    corner_times: Times,
    exit_layers: Sequence[int],
    num_speculations: Sequence[int],
) -> tuple[Setting, ...]:
    """Predicts the figures of every setting.

    token_time: milliseconds of an autoregressive pass. corner_times: milliseconds of a round at each (E, d) measured.
    """
    texts = [text for text in texts if text.tokens.max() > 1]
    emitted = sum(int((text.tokens - 1).sum()) for text in texts)
    table = []
    for d in num_speculations:
        rounds = [expected_rounds(text.acceptance, text.tokens, d) for text in texts]  # [L,N] each
        for e in exit_layers:
            round_time = interpolate(corner_times, e, d)
            ratios = [
                text.rounds(text.tokens - 1) * token_time / (text.rounds(ours[e - 1]) * round_time)
                for text, ours in zip(texts, rounds, strict=True)
            ]
            tokens_per_round = emitted / sum(ours[e - 1].sum() for ours in rounds)
            table.append(Setting(e, d, float(tokens_per_round), round_time, float(statistics.median(ratios))))
    return tuple(sorted(table))
