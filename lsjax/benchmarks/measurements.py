"""The measurements of a decoding benchmark: decoders that take turns, and all the results of each."""

import dataclasses
import statistics
from typing import Any, Protocol

from lsjax.decoding.results import GenerateResult, rates_by_position
from lsjax.decoding.strategies import Strategy
from lsjax.evaluation.repetition import repetition


class Decoder(Protocol):
    """A way of decoding the batches of a benchmark: one of our strategies, or another library."""

    @property
    def strategy(self) -> Strategy | None:
        """The strategy, or None for another library."""
        ...

    @property
    def label(self) -> str:
        """The name that lines of progress show."""
        ...

    def compile(self) -> float:
        """Compiles and warms up, and returns the seconds that compilation took."""
        ...

    def decode(self, batch_index: int) -> GenerateResult:
        """Decodes one batch and returns the tokens and the stats of each prompt."""
        ...

    def bytes_per_round(self) -> int | None:
        """Returns the bytes that a round must read at least, or None where they are not known."""
        ...


@dataclasses.dataclass
class Measurements:
    """All measurements of one decoder.

    results: results[batch][repeat]. Tokens and counts are the same in every repeat; times are medians over repeats.
    """

    results: list[list[GenerateResult]]
    compile_seconds: float = 0.0

    def seconds_per_pass(self) -> float | None:
        """Returns the seconds per round, or None when no text went beyond its first token."""
        rounds = sum(repeats[0].stats[0]["batch_rounds"] for repeats in self.results)
        return sum(self._medians("seconds")) / rounds if rounds else None

    def summary(self, autoregressive: "Measurements", greedy: bool = True) -> dict[str, Any]:
        """Returns the entry of this decoder in the report.

        autoregressive: what `speedup` and `matches_autoregressive` compare with.
        greedy: False when sampling, where only the distribution is the same, and so tokens are not compared.
        """
        stats = [entry for repeats in self.results for entry in repeats[0].stats]
        drafted, rounds = (sum(entry[key] for entry in stats) for key in ("drafted", "rounds"))
        new_tokens = sum(entry["new_tokens"] for entry in stats)
        settings = (
            *("strategy", "exit_layer", "num_speculations", "draft_weights", "draft_vocabulary", "lookup"),
            "batch_size",
        )
        return {
            **{key: stats[0][key] for key in settings},
            "new_tokens": new_tokens,
            "seconds": sum(self._medians("seconds")),
            "ms_per_token": _median(self._medians("ms_per_token")),
            "tokens_per_second": _median(self._medians("tokens_per_second")),
            "time_to_first_token_ms": _median(self._medians("time_to_first_token_ms")),
            "acceptance_rate": sum(entry["accepted"] for entry in stats) / drafted if drafted else None,
            "acceptance_by_position": rates_by_position(stats),
            "tokens_per_round": (new_tokens - len(stats)) / rounds if rounds else None,
            "speedup": self._speedup(autoregressive),
            "matches_autoregressive": self._tokens() == autoregressive._tokens() if greedy else None,
            "matching_share": self._matching_share(autoregressive) if greedy else None,
            "repetition": self.repetition(),
            "kernels": stats[0].get("kernels"),
            "compile_seconds": self.compile_seconds,
        }

    def repetition(self) -> float | None:
        """Returns the share of 4-grams that a new text repeats from itself, as the mean over the prompts."""
        shares = [repetition(text) for texts in self._tokens() for text in texts]
        known = [share for share in shares if share is not None]
        return statistics.mean(known) if known else None

    def _matching_share(self, autoregressive: "Measurements") -> float:
        """Returns the share of the tokens before the first difference, as the mean over the prompts; 1 without one."""
        pairs = [
            pair
            for theirs, ours in zip(autoregressive._tokens(), self._tokens(), strict=True)
            for pair in zip(theirs, ours, strict=True)
        ]
        return statistics.mean(_equal_prefix(theirs, ours) / max(len(theirs), len(ours)) for theirs, ours in pairs)

    def _speedup(self, autoregressive: "Measurements") -> float | None:
        """Returns the median over the batches of autoregressive decoding's time per token over this decoder's."""
        ratios = []
        for index in range(len(self.results)):
            theirs, ours = (each._batch_median(index, "ms_per_token") for each in (autoregressive, self))
            if theirs is not None and ours is not None:  # a text that ended with its first token has no time per token
                ratios.append(theirs / ours)
        return _median(ratios)

    def _batch_median(self, index: int, key: str) -> float | None:
        values = [entry[key] for result in self.results[index] for entry in result.stats]
        return None if None in values else statistics.median(values)

    def _medians(self, key: str) -> list[float]:
        values = (self._batch_median(index, key) for index in range(len(self.results)))
        return [value for value in values if value is not None]

    def _tokens(self) -> list[list[list[int]]]:
        return [repeats[0].tokens for repeats in self.results]


def other_library_stats(
    label: str,
    texts: list[list[int]],
    first_seconds: float,
    seconds: float,
    *,
    batch_size: int = 1,
    exit_layer: int | None = None,
    num_speculations: int | None = None,
) -> list[dict[str, Any]]:
    """Returns stats with the keys of our own for texts that another library decoded.

    texts: the new tokens of each. first_seconds: until the first ones. seconds: for all others.
    """
    looped = sum(map(len, texts)) - len(texts)  # prefill makes the first token of each text
    common = {
        "strategy": label,
        "exit_layer": exit_layer,
        "num_speculations": num_speculations,
        "draft_weights": None,
        "draft_vocabulary": None,
        "lookup": None,
        "batch_size": batch_size,
        "seconds": seconds,
        "ms_per_token": 1e3 * seconds / looped if looped else None,
        "tokens_per_second": looped / seconds if looped else None,
        "time_to_first_token_ms": 1e3 * first_seconds,
        "rounds": 0,
        "drafted": 0,
        "accepted": 0,
        "drafted_by_position": [],
        "accepted_by_position": [],
    }
    return [common | {"new_tokens": len(tokens)} for tokens in texts]


def _equal_prefix(a: list[int], b: list[int]) -> int:
    """Returns the number of tokens before the first difference."""
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
