"""Results of decoding: tokens, texts, and what the decoding did."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lsjax.decoding.batch import PromptBatch
from lsjax.decoding.model import Model
from lsjax.decoding.session import DecodedSequence, DecodeSession
from lsjax.decoding.stop_strings import final_text
from lsjax.decoding.strategies import Strategy
from lsjax.notebook import html_table


class GenerateResult(NamedTuple):
    """The results of `generate`, one entry per prompt.

    tokens: new token ids, including the stop token, or the token that completed a stop string.
    text: their text, up to the stop string.
    stats: what the decoding did (docs/decoding.md lists the keys).
    """

    tokens: list[list[int]]
    text: list[str]
    stats: list[dict[str, Any]]

    def __repr__(self) -> str:
        counts = sum(map(len, self.tokens))
        first = f", first: {self.text[0][:60]!r}" if self.text else ""
        return f"GenerateResult({len(self.tokens)} text(s), {counts} new tokens{first})"

    def _repr_html_(self) -> str:
        """Returns the table that a notebook shows: a row per prompt."""
        header = ("text", "new tokens", "ended by", "drafts accepted", "tokens per second")
        columns = ("finish_reason", "acceptance_rate", "tokens_per_second")
        rows = [
            (text, len(tokens), *(stats.get(name) for name in columns))
            for text, tokens, stats in zip(self.text, self.tokens, self.stats, strict=True)
        ]
        return html_table(header, rows)


def collect_result(
    strategy: Strategy, kernels: str, model: Model, batch: PromptBatch, session: DecodeSession
) -> GenerateResult:
    """Returns the result of a session that has run to the end. kernels: what wrote and read the KV cache."""
    sequences, seconds = session.results(), session.seconds
    # The loop emits all new tokens except the first of each sequence, which prefill emits.
    looped = sum(len(sequence.tokens) - 1 for sequence in sequences)
    common = {
        "strategy": strategy.name,
        **strategy.settings(),
        "batch_size": batch.batch_size,
        "batch_rounds": int(session.host_state.round),
        "kernels": kernels,
        "seconds": seconds,
        "ms_per_token": 1e3 * seconds / looped if looped else None,
        "tokens_per_second": looped / seconds if looped else None,
    }
    texts, stats = [], []
    for index, (sequence, prefill_seconds) in enumerate(zip(sequences, session.prefill_seconds, strict=True)):
        text, own = sequence_result(model, batch, index, sequence, prefill_seconds)
        texts.append(text)
        stats.append(common | own)
    return GenerateResult([sequence.tokens for sequence in sequences], texts, stats)


def sequence_result(
    model: Model, batch: PromptBatch, index: int, sequence: DecodedSequence, prefill_seconds: float
) -> tuple[str, dict[str, Any]]:
    """Returns (text, stats) of prompt `index`, which has ended. The stats are those of this sequence alone."""
    text, reason = ending(model, batch, index, sequence.tokens)
    first = {"finish_reason": reason, "time_to_first_token_ms": 1e3 * float(prefill_seconds)}
    return text, first | _counts(sequence)


def ending(model: Model, batch: PromptBatch, index: int, tokens: list[int]) -> tuple[str, str]:
    """Returns (text, finish_reason) of the new tokens of prompt `index`, which have ended."""
    text, stopped = final_text(model.tokenizer, tokens, batch.stop_texts[index], batch.prompt(index))
    return text, "stop" if stopped or tokens[-1] in batch.stop_token_ids[index] else "length"


def rates_by_position(stats: Sequence[dict[str, Any]]) -> list[float | None]:
    """Returns the share of rounds in which the i-th draft was accepted, over the stats of one or several sequences."""
    drafted, accepted = (
        [sum(column) for column in zip(*(entry[f"{what}_by_position"] for entry in stats), strict=True)]
        for what in ("drafted", "accepted")
    )
    return [part / whole if whole else None for part, whole in zip(accepted, drafted, strict=True)]


def _counts(sequence: DecodedSequence) -> dict[str, Any]:
    """Returns the stats of one sequence that are counts and rates of drafts."""
    by_position = {
        "drafted_by_position": sequence.drafted_at.tolist(),
        "accepted_by_position": sequence.accepted_at.tolist(),
    }
    drafted, accepted = (sum(counts) for counts in by_position.values())
    new_tokens = len(sequence.tokens)
    return {
        "new_tokens": new_tokens,
        "rounds": sequence.rounds,
        "drafted": drafted,
        "accepted": accepted,
        **by_position,
        "acceptance_rate": accepted / drafted if drafted else None,
        "acceptance_by_position": rates_by_position([by_position]),
        "tokens_per_round": (new_tokens - 1) / sequence.rounds if sequence.rounds else None,
    }
