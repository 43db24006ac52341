"""The cost model of self-speculation: what every exit layer and draft length would give, on some prompts and a device.

`acceptance` predicts the tokens per round. The time of a round is d (early layers + head) + early layers + late layers
for d+1 tokens + head. That is linear in the exit layer and nearly linear in the draft length. So it is measured at the
corners of the grid, on the same programs that decode, and interpolated between them. A draft vocabulary saves the same
time in every draft, whatever the exit layer; that is measured at one corner.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lsjax.decoding.batch import PromptBatch
from lsjax.decoding.draft_vocabulary import draft_token_ids
from lsjax.decoding.model import Model
from lsjax.decoding.program import DecodeProgram
from lsjax.decoding.strategies import (
    INT8,
    Autoregressive,
    DraftVocabulary,
    SelfSpeculative,
    Strategy,
    check_strategy,
    is_auto,
    is_choice_left,
    vocabulary_label,
)
from lsjax.errors import UserError, shown
from lsjax.io.draft_vocabulary import has_list, list_path, read_list
from lsjax.model.quantization import QuantizedLeft, states_in_int8
from lsjax.model.transformer import Params
from lsjax.tuning.acceptance import batch_rounds, draft_acceptance, expected_rounds
from lsjax.tuning.tuned_settings import saved_strategy

_LONGEST_DRAFT = 12
_SAMPLE_TOKENS = 64  # per text; more tokens would add little
_SAMPLE_BATCHES = 8
_TIMED_TOKENS = 24
_REPEATS = 5


Vocabulary = DraftVocabulary | None


class Setting(NamedTuple):
    """Predicted figures of one setting. `speedup` is against autoregressive decoding, the median over batches.

    draft_vocabulary: as in SelfSpeculative.
    """

    exit_layer: int
    num_speculations: int
    tokens_per_round: float
    milliseconds_per_round: float
    speedup: float
    draft_vocabulary: Vocabulary = None


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
        best = self.best
        return SelfSpeculative(best.exit_layer, best.num_speculations, draft_vocabulary=best.draft_vocabulary)

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
        if strategy.draft_weights or strategy.lookup:
            return None
        settings = strategy.settings()
        wanted = settings["exit_layer"], settings["num_speculations"], strategy.draft_vocabulary
        return next((s for s in self.table if (*s[:2], s.draft_vocabulary) == wanted), None)

    def __str__(self) -> str:
        best = self.best
        drafts = f"{best.num_speculations} draft(s) {vocabulary_label(self.strategy.settings())}".rstrip()
        setting = f"exit layer {best.exit_layer} with {drafts}"
        figures = f"{best.speedup:.2f} times autoregressive, {best.tokens_per_round:.2f} tokens per round"
        if best.speedup > 1:
            return f"{setting} is predicted to be the fastest: {figures}"
        return f"no setting is predicted to beat autoregressive; the best, {setting}: {figures}"


class DecodedBatch(NamedTuple):
    """A batch that was decoded once, and which drafts would be accepted on its texts.

    acceptance: the chance that a draft of each new token is accepted, by exit layer and prompt [L,N,n].
    tokens: number of new tokens per prompt [N]. batch_size: sequences decoded side by side.
    """

    acceptance: np.ndarray
    tokens: np.ndarray
    batch_size: int

    def rounds(self, rounds_per_prompt: np.ndarray) -> float:
        """Returns the rounds of the batch, from those of each prompt [N]."""
        return batch_rounds(rounds_per_prompt, self.batch_size)


def resolve_auto(strategy: Strategy, model: Model, batch: PromptBatch) -> Strategy:
    """Returns the strategy with numbers in place of "auto"; autoregressive where nothing is predicted to be faster.

    A table of tuned settings beside the model saves the measuring.
    """
    if not is_auto(strategy):
        return strategy
    assert isinstance(strategy, SelfSpeculative)
    exit_layers, num_speculations = candidates(strategy, model.config.num_layers)
    saved = saved_strategy(strategy, model, batch)
    if saved is not None:
        return saved
    choices = vocabularies(strategy, model)
    tuning = measure_settings(model, [batch], exit_layers, num_speculations, draft_vocabularies=choices)
    return tuning.strategy if tuning and tuning.predicted_speedup > 1 else Autoregressive()


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
    if strategy.draft_weights:
        raise UserError('"auto" predicts drafts from the model\'s own weights: give numbers beside draft_weights')
    if strategy.lookup:
        raise UserError('"auto" does not measure lookup: tune without it, then add it to the strategy found')
    exits = (exit_layer,) if isinstance(exit_layer, int) else range(1, max(1, 3 * num_layers // 4) + 1)
    lengths = (drafts,) if isinstance(drafts, int) else range(1, _LONGEST_DRAFT + 1)
    return tuple(exits), tuple(lengths)


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


def measure_settings(
    model: Model,
    batches: Sequence[PromptBatch],
    exit_layers: Sequence[int],
    num_speculations: Sequence[int],
    note: Callable[[str], None] = lambda _: None,
    draft_vocabularies: Sequence[Vocabulary] = (None,),
) -> Tuning | None:
    """Predicts every exit layer with every draft length and draft vocabulary.

    Returns None when every text ends with its first token.

    Looks at the first tokens of each text. Of many batches it takes a few, spread evenly; of many prompts the first.
    note: receives one line of progress at a time.
    """
    chosen = range(0, len(batches), -(-len(batches) // _SAMPLE_BATCHES))
    batches = [batches[index].part(0, _SAMPLE_BATCHES * batches[index].batch_size) for index in chosen]
    note(f"tuning: decoding {len(batches)} batch(es) once, to see which exit agrees where")
    runs = [_run(model, _compiled(model, Autoregressive(), batch), batch, _SAMPLE_TOKENS) for batch in batches]
    params = _params_as_decoded(model)
    texts = [
        read_with_vocabularies(model, params, batch, run.tokens, draft_vocabularies)
        for batch, run in zip(batches, runs, strict=True)
    ]
    longest = max(range(len(texts)), key=lambda index: texts[index][0].tokens.max())
    if texts[longest][0].tokens.max() == 1:
        return None
    token_time, times = _corner_times(model, batches[longest], exit_layers, num_speculations, draft_vocabularies, note)
    table = [
        setting._replace(draft_vocabulary=vocabulary)
        for vocabulary, corner_times, drafted in zip(draft_vocabularies, times, zip(*texts, strict=True), strict=True)
        for setting in predict(drafted, token_time, corner_times, exit_layers, num_speculations)
    ]
    return Tuning(tuple(sorted(table, key=lambda setting: setting[:2])), token_time)


def _params_as_decoded(model: Model) -> Params:
    """Returns stacked parameters, for a model loaded for decoding only a new copy at every call.

    Weights in int8 round states where those that decode do.
    """
    head = model.decoder_weights().get("lm_head")
    return states_in_int8(model.stack_params(), rounded=isinstance(head, QuantizedLeft))


def _corner_times(
    model: Model,
    batch: PromptBatch,
    exit_layers: Sequence[int],
    num_speculations: Sequence[int],
    draft_vocabularies: Sequence[Vocabulary],
    note: Callable[[str], None],
) -> tuple[float, list[dict[tuple[int, int], float]]]:
    """Returns (milliseconds of an autoregressive pass, those of a round at each corner for every vocabulary).

    All corners are timed with the first vocabulary. The others are timed at the corner of the earliest exit and the
    most drafts, where the head is the largest part of a round.
    """
    first, *others = draft_vocabularies
    corners, common = corners_of(exit_layers, num_speculations), (min(exit_layers), max(num_speculations))
    settings = [(*pair, first) for pair in corners] + [(*common, vocabulary) for vocabulary in others]
    strategies = [SelfSpeculative(e, d, draft_vocabulary=vocabulary) for e, d, vocabulary in settings]
    token_time, *round_times = _round_times(model, batch, [Autoregressive(), *strategies], note)
    corner_times = dict(zip(corners, round_times[: len(corners)], strict=True))
    all_times = [corner_times]
    for round_time in round_times[len(corners) :]:
        saved_by_draft = (corner_times[common] - round_time) / common[1]
        all_times.append({(e, d): corner_times[e, d] - d * saved_by_draft for e, d in corners})
    return token_time, all_times


def read_decoded(model: Model, params: Params, batch: PromptBatch, new_tokens: list[list[int]]) -> DecodedBatch:
    """Reads a batch's prompts with their continuations in one pass, and finds which drafts would be accepted."""
    return read_with_vocabularies(model, params, batch, new_tokens, (None,))[0]


def read_with_vocabularies(
    model: Model,
    params: Params,
    batch: PromptBatch,
    new_tokens: list[list[int]],
    draft_vocabularies: Sequence[Vocabulary],
) -> list[DecodedBatch]:
    """Returns what `read_decoded` does for drafts of each vocabulary, from the same single pass."""
    count = min(int(batch.max_new_tokens.max()), _SAMPLE_TOKENS)
    texts = np.zeros((batch.tokens.shape[0], batch.tokens.shape[1] + count), np.int32)
    texts[:, : batch.tokens.shape[1]] = batch.tokens
    for row, (start, new) in enumerate(zip(batch.lengths, new_tokens, strict=True)):
        texts[row, start : start + len(new)] = new
    dtype = model.decoder_weights()["embed"].dtype
    known = np.stack([_known_tokens(model, vocabulary) for vocabulary in draft_vocabularies])
    kept = draft_acceptance(
        params,
        texts,
        batch.lengths,
        batch.sampler,
        model.config,
        count,
        dtype,
        known,
        int8_cache=model.cache == INT8,
        exit_adapter=model.exit_adapter,
    )
    lengths = np.array([len(new) for new in new_tokens])
    return [DecodedBatch(each, lengths, batch.batch_size) for each in np.asarray(kept.chance, np.float64)]


def _known_tokens(model: Model, vocabulary: Vocabulary) -> np.ndarray:
    """Returns which tokens belong to a draft vocabulary, bool [V]."""
    vocab_size = model.config.vocab_size
    if vocabulary is None:
        return np.ones(vocab_size, bool)
    return np.isin(np.arange(vocab_size), draft_token_ids(vocabulary, model.tokenizer, vocab_size, model.path))


def predict(
    texts: Sequence[DecodedBatch],
    token_time: float,
    corner_times: dict[tuple[int, int], float],
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


def interpolate(corner_times: dict[tuple[int, int], float], exit_layer: int, num_speculations: int) -> float:
    """Interpolates a time linearly along both, from times at every pair of some exit layers and draft lengths."""
    exits, drafts = (sorted(set(values)) for values in zip(*corner_times, strict=True))
    along = [np.interp(num_speculations, drafts, [corner_times[e, d] for d in drafts]) for e in exits]
    return float(np.interp(exit_layer, exits, along))


def _round_times(
    model: Model, batch: PromptBatch, strategies: Sequence[Strategy], note: Callable[[str], None]
) -> list[float]:
    """Returns milliseconds per round of each strategy: medians of interleaved repeats, compilation left out."""
    programs = []
    for index, strategy in enumerate(strategies, 1):
        note(f"tuning: compiling {index}/{len(strategies)}")
        programs.append(_compiled(model, strategy, batch))
        _run(model, programs[-1], batch, _TIMED_TOKENS)
    note(f"tuning: timing {len(strategies)} settings")
    times = [[_round_time(_run(model, program, batch, _TIMED_TOKENS)) for program in programs] for _ in range(_REPEATS)]
    # Ratios are taken within a repeat: what slows the machine for a while slows all settings.
    first = statistics.median(repeat[0] for repeat in times)
    return [first * statistics.median(repeat[i] / repeat[0] for repeat in times) for i in range(len(strategies))]


def _round_time(result) -> float:
    """Returns milliseconds per round; all sequences share a round."""
    return 1e3 * result.stats[0]["seconds"] / result.stats[0]["batch_rounds"]


def _compiled(model: Model, strategy: Strategy, batch: PromptBatch):
    program = DecodeProgram(model.config, strategy, batch)
    program.compile(program.weights(model), model.kernels, model.cache)
    return program


def _run(model: Model, program, batch: PromptBatch, tokens: int):
    return program.run(model, batch._replace(max_new_tokens=np.minimum(batch.max_new_tokens, tokens)))
