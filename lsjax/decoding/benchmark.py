"""Fair comparisons of decoding strategies: same prompts, repeats interleaved, medians, compilation apart."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lsjax.decoding.bandwidth import PlainRead, bytes_per_round
from lsjax.decoding.batch import PromptBatch
from lsjax.decoding.generate import DecodeProgram, GenerateResult, rates_by_position
from lsjax.decoding.passes import cache_dtype
from lsjax.decoding.settings import Tuning
from lsjax.decoding.strategies import INT8, Autoregressive, Sampling, Strategy, label
from lsjax.errors import UserError
from lsjax.loading import Model


def benchmark(
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    strategies: Sequence[Strategy],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 1,
    repeats: int = 3,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    seed: int = 0,
    rivals: Callable[[list[PromptBatch]], list["Trial"]] = lambda _: [],
    stop: str | Sequence[str] = (),
    note: Callable[[str], None] = lambda _: None,
    tuning: Tuning | None = None,
) -> dict[str, Any]:
    """Runs every strategy on every prompt `repeats` times; returns the report of launch/decode.py as a dict.

    Autoregressive decoding always runs too: it is what `speedup` and `matches_autoregressive` compare with (None when
    sampling: the distribution is the same, not the tokens).
    `stop`: texts that end a row, as in `generate`; the look for them after every round is inside the times.
    Prompts go one at a time; with a batch_size above 1 so many side by side, one that is done making room for the next.
    `rivals`: other decoders of the same prompts, measured in the same rounds. `tuning`: its predictions stand beside
    what is measured. `bandwidth`: what autoregressive decoding reads, and how fast beside a plain read of the weights.
    """
    if repeats < 1:
        raise UserError(f"repeats must be at least 1, got {repeats}")
    strategies = [Autoregressive(), *(s for s in strategies if s != Autoregressive())]
    batches = prompt_batches(model, prompts, max_new_tokens, batch_size, sampling, seed, stop)
    trials = [*(Trial(model, strategy, batches) for strategy in strategies), *rivals(batches)]
    if jax.default_backend() == "cpu" and (model.in_int8 or any(getattr(s, "draft_weights", None) for s in strategies)):
        note("int8 weights are for TPU and GPU: on CPU they are slower than float32, several times")
    if jax.default_backend() == "cpu" and model.cache == INT8:
        note("a KV cache in int8 is for TPU and GPU: on CPU it is smaller, but written out in float32 for every pass")
    read = PlainRead(model.decoder_weights)
    _measure(trials, read, repeats, len(prompts), note)
    return {
        "model": model.path,
        "weights": INT8 if model.in_int8 else str(model.decoder_weights["embed"].dtype),
        "cache": str(cache_dtype(model.decoder_weights, model.cache)),
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()})",
        "devices": len(model.decoder_weights["embed"].sharding.device_set),
        "jax_version": jax.__version__,
        "max_new_tokens": max_new_tokens,
        "sampling": dataclasses.asdict(sampling) | {"seed": seed},
        "stop": list(batches[0].stop_texts),
        "prompts": len(prompts),
        "repeats": repeats,
        "bandwidth": read.summary(trials[0].bytes_per_round(), trials[0].seconds_per_pass()),
        "runs": [_run_report(trial, trials[0], sampling.temperature == 0, tuning) for trial in trials],
    }


def _run_report(trial: "Trial", reference: "Trial", greedy: bool, tuning: Tuning | None) -> dict[str, Any]:
    read = {"bytes_per_round": trial.bytes_per_round() if trial.strategy else None}
    return trial.summary(reference, greedy) | read | _predicted(trial.strategy, tuning)


def _measure(trials: list["Trial"], read: PlainRead, repeats: int, prompts: int, note: Callable[[str], None]) -> None:
    """Compiles all, then runs all on each batch in turn, a plain read of the weights before."""
    for index, trial in enumerate(trials, 1):
        note(f"compiling {index}/{len(trials)}: {trial.label}")
        trial.compile()
    for repeat in range(repeats):
        note(f"measuring, round {repeat + 1}/{repeats}: {len(trials)} settings on {prompts} prompt(s)")
        for batch_index in range(len(trials[0].batches)):
            read.measure()
            for trial in trials:
                trial.measure(batch_index)


def prompt_batches(
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    seed: int = 0,
    stop: str | Sequence[str] = (),
) -> list[PromptBatch]:
    """A batch a prompt; with a batch_size above 1, one of all, filled up from the first ones if it has more rows."""
    if batch_size == 1:
        groups = [[prompt] for prompt in prompts]
    else:
        groups = [[prompts[index % len(prompts)] for index in range(max(len(prompts), batch_size))]]
    return [
        PromptBatch.make(model, group, max_new_tokens, sampling, seed, stop, batch_size=batch_size) for group in groups
    ]


def _predicted(strategy: Strategy, tuning: Tuning | None) -> dict[str, float | None]:
    setting = tuning.at(strategy) if tuning else None
    return {
        "predicted_speedup": setting.speedup if setting else None,
        "predicted_tokens_per_round": setting.tokens_per_round if setting else None,
    }


class Trial:
    """One strategy and all its measurements: results[batch][repeat]."""

    def __init__(self, model: Model, strategy: Strategy, batches: list[PromptBatch]):
        self.model, self.strategy, self.batches = model, strategy, batches
        self.programs = [DecodeProgram(model.config, strategy, batch) for batch in batches]
        self.results: list[list[GenerateResult]] = [[] for _ in batches]
        self.compile_seconds = 0.0

    @property
    def label(self) -> str:
        return label(self.strategy)

    def compile(self) -> None:
        how = self.model.kernels, self.model.cache
        self.compile_seconds = sum(program.compile(program.weights(self.model), *how) for program in self.programs)
        self.programs[0].run(self.model, self.batches[0])  # warm-up, not counted

    def measure(self, index: int) -> None:
        self.results[index].append(self.programs[index].run(self.model, self.batches[index]))

    def median(self, index: int, key: str) -> float | None:
        values = [row[key] for result in self.results[index] for row in result.stats]
        return None if None in values else statistics.median(values)

    def medians(self, key: str) -> list[float]:
        values = (self.median(index, key) for index in range(len(self.batches)))
        return [value for value in values if value is not None]

    def bytes_per_round(self) -> int:
        """Read at the least, on average over the batches."""
        how = self.programs[0].weights(self.model), self.model.config, self.strategy, self.batches[0].rows
        read = [bytes_per_round(*how, program.entries_read, self.model.cache) for program in self.programs]
        return sum(read) // len(read)

    def seconds_per_pass(self) -> float | None:
        rounds = sum(results[0].stats[0]["batch_rounds"] for results in self.results)
        return sum(self.medians("seconds")) / rounds if rounds else None

    def summary(self, reference: "Trial", greedy: bool = True) -> dict[str, Any]:
        rows = [row for results in self.results for row in results[0].stats]
        drafted, rounds = sum(row["drafted"] for row in rows), sum(row["rounds"] for row in rows)
        new_tokens = sum(row["new_tokens"] for row in rows)
        pairs = [
            (reference.median(i, "ms_per_token"), self.median(i, "ms_per_token")) for i in range(len(self.batches))
        ]
        # A text that ended with its first token has no time a token.
        pairs = [pair for pair in pairs if None not in pair]
        return {
            "strategy": rows[0]["strategy"],
            "exit_layer": rows[0]["exit_layer"],
            "num_speculations": rows[0]["num_speculations"],
            "draft_weights": rows[0]["draft_weights"],
            "lookup": rows[0]["lookup"],
            "batch_size": rows[0]["batch_size"],
            "new_tokens": new_tokens,
            "seconds": sum(self.medians("seconds")),
            "ms_per_token": _median(self.medians("ms_per_token")),
            "tokens_per_second": _median(self.medians("tokens_per_second")),
            "time_to_first_token_ms": _median(self.medians("time_to_first_token_ms")),
            "acceptance_rate": sum(row["accepted"] for row in rows) / drafted if drafted else None,
            "acceptance_by_position": rates_by_position(rows),
            "tokens_per_round": (new_tokens - len(rows)) / rounds if rounds else None,
            "speedup": _median([theirs / ours for theirs, ours in pairs]),
            "matches_autoregressive": self._tokens() == reference._tokens() if greedy else None,
            "kernels": rows[0].get("kernels"),
            "compile_seconds": self.compile_seconds,
        }

    def _tokens(self) -> list[list[list[int]]]:
        return [results[0].tokens for results in self.results]


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
