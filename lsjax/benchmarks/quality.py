"""Quality beside speed: one task decoded by one strategy, with scores, speeds and their confidence intervals."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from lsjax.benchmarks.decoding import StrategyDecoder
from lsjax.decoding.batch import GenerationConfig, PromptBatch
from lsjax.decoding.model import Model
from lsjax.decoding.strategies import INT8, SelfSpeculative, Strategy, label
from lsjax.evaluation.bootstrap import Estimate, bootstrap, mean, median, ratio
from lsjax.evaluation.tasks.held_out_text import HeldOutText, Window, window_bits
from lsjax.evaluation.tasks.task import Example, Task
from lsjax.files import path_of
from lsjax.training.progress import format_duration

Note = Callable[[str], None]
_SECONDS_BETWEEN_NOTES = 5.0
_BITS_PER_BYTE = "bits_per_byte"


class InexactError(Exception):
    """A greedy self-speculative text in float32 that is not the autoregressive one. The message names the example."""


class Progress:
    """Lines of progress for one row of a report, at most one every five seconds."""

    def __init__(self, title: str, total: int, note: Note):
        self._title, self._total, self._note = title, total, note
        self._began = self._last = time.monotonic()

    def update(self, done: int) -> None:
        """Notes how many examples are done, and how long the others will take."""
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_NOTES and 0 < done < self._total:
            self._last = now
            remaining = format_duration((now - self._began) / done * (self._total - done))
            self._note(f"{self._title}: {done}/{self._total} examples, ETA {remaining}")


@dataclasses.dataclass(frozen=True)
class TaskRun:
    """A task with the examples and the request that every strategy gets.

    name: the task as --tasks names it. request: the same for all strategies. seed: of the bootstrap.
    """

    name: str
    task: Task
    examples: Sequence[Example]
    request: GenerationConfig
    seed: int

    def batches(self, model: Model) -> list[PromptBatch]:
        """Returns the prompts in batches, in order."""
        size = self.request.batch_size or 1
        prompts = [example.prompt for example in self.examples]
        groups = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        return [PromptBatch.make(model, group, self.request) for group in groups]


def measure_task(
    model: Model, run: TaskRun, strategy: Strategy, autoregressive: dict[str, Any] | None, note: Note
) -> dict[str, Any]:
    """Decodes and scores every example of a task. Returns the row of the report.

    strategy: with numbers in place of "auto". autoregressive: the row of autoregressive decoding, which speed-up and
    equal texts compare with; None for that row itself.
    Raises InexactError when a self-speculative row in float32 is not exactly the autoregressive one.
    """
    batches = run.batches(model)
    decoder = StrategyDecoder(model, strategy, batches)
    compile_seconds = decoder.compile()
    theirs = autoregressive["records"] if autoregressive else []
    records: list[dict[str, Any]] = []
    seconds = 0.0
    progress = Progress(f"{run.name}, {label(strategy)}", len(run.examples), note)
    for index in range(len(batches)):
        result = decoder.decode(index)
        seconds += result.stats[0]["seconds"]  # those of the whole batch
        for tokens, text, stats in zip(result.tokens, result.text, result.stats, strict=True):
            number = len(records)
            known = theirs[number] if theirs else None
            records.append(_record(run, number, tokens, text, stats, known))
        progress.update(len(records))
    if must_be_exact(model, strategy) and theirs:
        check_exact(run.name, records, theirs)
    return _settings(run.name, strategy, len(records)) | {
        "metrics": {name: _estimate(mean, _column(records, name), seed=run.seed) for name in run.task.metrics},
        **_speeds(records, theirs or records, run.seed),
        "seconds": seconds,
        "compile_seconds": compile_seconds,
        "records": records,
    }


def must_be_exact(model: Model, strategy: Strategy) -> bool:
    """Returns whether a strategy must give exactly the autoregressive tokens: greedy self-speculation in float32."""
    in_float32 = model.decoder_weights()["embed"].dtype == jnp.float32 and not model.in_int8
    return isinstance(strategy, SelfSpeculative) and in_float32 and model.cache != INT8


def check_exact(name: str, ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> None:
    """Raises InexactError that names the first example whose tokens are not the autoregressive ones.

    Equal tokens are equal texts, which have one score.
    """
    for mine, other in zip(ours, theirs, strict=True):
        if mine["tokens"] == other["tokens"]:
            continue
        pairs = enumerate(zip(mine["tokens"], other["tokens"], strict=False), 1)
        shorter = min(len(mine["tokens"]), len(other["tokens"]))
        place = next((number for number, (a, b) in pairs if a != b), shorter + 1)
        raise InexactError(
            f"{name}, example {mine['name']}: self-speculation in float32 is not exact: its new token {place} is not "
            "the autoregressive one; please report this"
        )


def measure_held_out_text(
    model: Model, name: str, windows: Sequence[Window], strategy: Strategy, seed: int, note: Note
) -> dict[str, Any]:
    """Returns the row of a strategy for held-out text: the bits per byte of the exit that its text comes from."""
    params = model.stack_params()
    exit_layer = strategy.layers_run(model.config.num_layers)
    progress = Progress(f"{name}, {label(strategy)}", len(windows), note)
    records = []
    for window in windows:
        bits = window_bits(params, window, model.config, exit_layer)
        records.append({"name": window.name, "bits": bits, "bytes": window.num_bytes})
        progress.update(len(records))
    estimate = _estimate(ratio, _column(records, "bits"), _column(records, "bytes"), seed=seed)
    figures = dict.fromkeys(("acceptance_rate", "tokens_per_second", "speedup", "same_texts"))
    return _settings(name, strategy, len(records)) | {
        "metrics": {_BITS_PER_BYTE: estimate}, **figures, "records": records
    }  # fmt: skip


def held_out_windows(model: Model, task: HeldOutText) -> list[Window]:
    """Returns the windows of a held-out text task for a model."""
    return task.windows(path_of(model.path), model.tokenizer, model.config)


def _settings(name: str, strategy: Strategy, num_examples: int) -> dict[str, Any]:
    settings = strategy.settings()
    return {
        "task": name,
        "decoded_by": strategy.name,
        "exit_layer": settings["exit_layer"],
        "num_speculations": settings["num_speculations"],
        "draft_vocabulary": settings["draft_vocabulary"],
        "examples": num_examples,
    }


def _record(
    run: TaskRun, number: int, tokens: list[int], text: str, stats: dict[str, Any], known: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns what the report keeps of one example. known: its autoregressive record, whose score a same text has."""
    example = run.examples[number]
    same = known is None or known["tokens"] == tokens
    scores = known["scores"] if known and same else run.task.score(example, text)
    kept = ("finish_reason", "new_tokens", "rounds", "drafted", "accepted", "ms_per_token", "tokens_per_second")
    return {
        "name": example.name,
        "text": text,
        "tokens": tokens,
        "scores": scores,
        "same": same,
        **{key: stats[key] for key in kept},
    }


def _speeds(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Returns acceptance, speed, speed-up and share of equal texts of a row, each with its interval."""
    drafted, accepted = _column(ours, "drafted"), _column(ours, "accepted")
    pairs = [
        (mine["tokens_per_second"], other["ms_per_token"] / mine["ms_per_token"])
        for mine, other in zip(ours, theirs, strict=True)
        if mine["ms_per_token"] and other["ms_per_token"]  # a text of one token has no time per token
    ]
    return {
        "acceptance_rate": _estimate(ratio, accepted, drafted, seed=seed),
        "tokens_per_second": _estimate(median, [speed for speed, _ in pairs], seed=seed),
        "speedup": _estimate(median, [speedup for _, speedup in pairs], seed=seed),
        "same_texts": _estimate(mean, _column(ours, "same"), seed=seed),
    }


def _column(records: Sequence[dict[str, Any]], key: str) -> list[float]:
    """Returns one figure of every example, from the records themselves or from their scores."""
    return [float(record[key] if key in record else record["scores"][key]) for record in records]


def _estimate(statistic: Callable[..., float], *columns: Sequence[float], seed: int) -> dict[str, float] | None:
    estimate: Estimate | None = bootstrap(statistic, *columns, seed=seed)
    return estimate._asdict() if estimate else None
