"""Quality beside speed: a task decoded by strategies in turns, with scores, speeds and their confidence intervals."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from lsjax.benchmarks.decoding import StrategyDecoder
from lsjax.decoding.batch import GenerationConfig, PromptBatch
from lsjax.decoding.model import Model
from lsjax.decoding.results import GenerateResult
from lsjax.decoding.strategies import AUTOREGRESSIVE, INT8, SelfSpeculative, Strategy, label
from lsjax.errors import UserError
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
    """Lines of progress, at most one every five seconds."""

    def __init__(self, title: str, unit: str, total: int, note: Note):
        self._title, self._unit, self._total, self._note = title, unit, total, note
        self._began = self._last = time.monotonic()

    def update(self, done: int) -> None:
        """Notes how many are done, and how long the others will take."""
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_NOTES and 0 < done < self._total:
            self._last = now
            remaining = format_duration((now - self._began) / done * (self._total - done))
            self._note(f"{self._title}: {done}/{self._total} {self._unit}, ETA {remaining}")


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

    @property
    def batch_size(self) -> int:
        """The examples per batch; the last batch may have fewer."""
        return self.request.batch_size or 1

    def batches(self, model: Model) -> list[PromptBatch]:
        """Returns the prompts in batches, in order."""
        size = self.batch_size
        prompts = [example.prompt for example in self.examples]
        groups = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        return [PromptBatch.make(model, group, self.request) for group in groups]


@dataclasses.dataclass
class StrategyRecords:
    """Holds what is measured of a strategy on a task: whole batches, in order.

    strategy: with numbers in place of "auto". records: one per example. seconds, compile_seconds: of all its batches.
    """

    strategy: Strategy
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    compile_seconds: float = 0.0


def decode_in_turns(
    model: Model, run: TaskRun, measured: dict[str, StrategyRecords], note: Note, save: Callable[[], None]
) -> None:
    """Decodes and scores what strategies lack of a task. All of them decode a batch before the next batch begins.

    measured: by name, completed in place; autoregressive decoding is one of them. It decodes a batch again that only
      others lack, so that their speed-ups compare with the same minutes.
    save: called after each batch.

    Raises InexactError when a self-speculative text in float32 is not exactly the autoregressive one, and UserError
    when autoregressive decoding repeats a batch and gives other tokens than before. That batch is not kept.
    """
    batches, size = run.batches(model), run.batch_size
    counts = {name: -(-len(each.records) // size) for name, each in measured.items()}
    turns = turns_of_batches(counts, len(batches))
    decoders = {}
    for name in measured:
        if any(name in names for names in turns):
            decoders[name] = StrategyDecoder(model, measured[name].strategy, batches)
            seconds = decoders[name].compile()
            measured[name].compile_seconds += seconds if counts[name] < len(batches) else 0
    done, total = 0, sum(map(bool, turns))
    progress = Progress(run.name, "batches", total, note)
    for index, names in enumerate(turns):
        if names:
            results = {name: decoders[name].decode(index) for name in names}
            _keep(model, run, index * size, measured, results)
            save()
            done += 1
            progress.update(done)


def turns_of_batches(batches_measured: dict[str, int], num_batches: int) -> list[list[str]]:
    """Returns the strategies that decode each batch, in their order; none where no strategy lacks the batch.

    batches_measured: the number of batches that each strategy has. Autoregressive decoding takes part wherever another
      strategy does. The first of one batch is the last of the next, so that what happens between batches, such as
      scoring, meets all alike.
    """
    turns = []
    for index in range(num_batches):
        due = {name for name, count in batches_measured.items() if count <= index}
        names = [name for name in batches_measured if name in due or (due and name == AUTOREGRESSIVE.name)]
        first = index % len(names) if names else 0
        turns.append(names[first:] + names[:first])
    return turns


def _keep(
    model: Model, run: TaskRun, start: int, measured: dict[str, StrategyRecords], results: dict[str, GenerateResult]
) -> None:
    """Checks and scores the results of one batch, and then adds them to the records of those that lacked it."""
    autoregressive = results[AUTOREGRESSIVE.name]
    theirs = measured[AUTOREGRESSIVE.name].records[start : start + run.batch_size]
    new: dict[str, list[dict[str, Any]]] = {}
    if theirs:
        _check_repeated(run.name, autoregressive.tokens, theirs)
    else:
        theirs = new[AUTOREGRESSIVE.name] = _records(run, start, autoregressive, autoregressive, None)
    for name in [name for name in results if name != AUTOREGRESSIVE.name]:
        new[name] = _records(run, start, results[name], autoregressive, theirs)
        if must_be_exact(model, measured[name].strategy):
            check_exact(run.name, new[name], theirs)
    for name, records in new.items():
        measured[name].records.extend(records)
        measured[name].seconds += results[name].stats[0]["seconds"]  # those of the whole batch


def _check_repeated(name: str, tokens: Sequence[list[int]], known: Sequence[dict[str, Any]]) -> None:
    for ours, record in zip(tokens, known, strict=True):
        if ours != record["tokens"]:
            raise UserError(
                f"{name}, example {record['name']}: autoregressive decoding gives another text than the one in the "
                "report, so nothing can join it: give another file"
            )


def task_row(run: TaskRun, measured: StrategyRecords) -> dict[str, Any]:
    """Returns the row of the report of a strategy; before all examples are decoded, without the figures."""
    records = measured.records
    return {
        **row_settings(run.name, measured.strategy, len(records)),
        **(_figures(run, records) if len(records) == len(run.examples) else {}),
        "seconds": measured.seconds,
        "compile_seconds": measured.compile_seconds,
        "records": records,
    }


def _figures(run: TaskRun, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    metrics = {name: _estimate(mean, _column(records, name), seed=run.seed) for name in run.task.metrics}
    return {"metrics": metrics, **_speeds(records, run.batch_size, run.seed)}


def check_records(run: TaskRun, records: Sequence[dict[str, Any]]) -> None:
    """Raises an error unless records are those of whole batches of a task, with all that the figures need."""
    names = [example.name for example in run.examples[: len(records)]]
    if [record["name"] for record in records] != names or (
        len(records) % run.batch_size and len(records) < len(run.examples)
    ):
        raise ValueError("records of other examples")
    _figures(run, records)


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
    progress = Progress(f"{name}, {label(strategy)}", "windows", len(windows), note)
    records = []
    for window in windows:
        bits = window_bits(params, window, model.config, exit_layer)
        records.append({"name": window.name, "bits": bits, "bytes": window.num_bytes})
        progress.update(len(records))
    estimate = _estimate(ratio, _column(records, "bits"), _column(records, "bytes"), seed=seed)
    figures = dict.fromkeys(("acceptance_rate", "tokens_per_second", "speedup", "same_texts"))
    return row_settings(name, strategy, len(records)) | {
        "metrics": {_BITS_PER_BYTE: estimate}, **figures, "records": records
    }  # fmt: skip


def held_out_windows(model: Model, task: HeldOutText) -> list[Window]:
    """Returns the windows of a held-out text task for a model."""
    return task.windows(path_of(model.path), model.tokenizer, model.config)


def row_settings(name: str, strategy: Strategy, num_examples: int) -> dict[str, Any]:
    """Returns the part of a row that says what was decoded, and how."""
    settings = strategy.settings()
    return {
        "task": name,
        "decoded_by": strategy.name,
        "exit_layer": settings["exit_layer"],
        "num_speculations": settings["num_speculations"],
        "draft_vocabulary": settings["draft_vocabulary"],
        "draft_weights": settings["draft_weights"],
        "examples": num_examples,
    }


def _records(
    run: TaskRun,
    start: int,
    result: GenerateResult,
    autoregressive: GenerateResult,
    known: Sequence[dict[str, Any]] | None,
) -> list[dict[str, Any]]:
    """Returns what the report keeps of the examples of one batch.

    start: the place of its first example. autoregressive: the same batch in the same turn.
    known: the autoregressive records, whose scores equal texts have.
    """
    kept = ("finish_reason", "new_tokens", "rounds", "drafted", "accepted", "ms_per_token", "tokens_per_second")
    records = []
    for place, (tokens, text, stats) in enumerate(zip(result.tokens, result.text, result.stats, strict=True)):
        example, theirs = run.examples[start + place], known[place] if known else None
        same = theirs is None or theirs["tokens"] == tokens
        records.append(
            {
                "name": example.name,
                "text": text,
                "tokens": tokens,
                "scores": theirs["scores"] if theirs and same else run.task.score(example, text),
                "same": same,
                **{key: stats[key] for key in kept},
                "autoregressive_ms_per_token": autoregressive.stats[place]["ms_per_token"],
            }
        )
    return records


def _speeds(records: Sequence[dict[str, Any]], batch_size: int, seed: int) -> dict[str, Any]:
    """Returns acceptance, speed, speed-up and share of equal texts, each with its interval.

    The examples of a batch share their time, so speeds are medians over the batches.
    """
    drafted, accepted = _column(records, "drafted"), _column(records, "accepted")
    pairs = [
        (first["tokens_per_second"], first["autoregressive_ms_per_token"] / first["ms_per_token"])
        for first in records[::batch_size]
        if first["ms_per_token"] and first["autoregressive_ms_per_token"]  # texts of one token have no time per token
    ]
    return {
        "acceptance_rate": _estimate(ratio, accepted, drafted, seed=seed),
        "tokens_per_second": _estimate(median, [speed for speed, _ in pairs], seed=seed),
        "speedup": _estimate(median, [speedup for _, speedup in pairs], seed=seed),
        "same_texts": _estimate(mean, _column(records, "same"), seed=seed),
    }


def _column(records: Sequence[dict[str, Any]], key: str) -> list[float]:
    """Returns one figure of every example, from the records themselves or from their scores."""
    return [float(record[key] if key in record else record["scores"][key]) for record in records]


def _estimate(statistic: Callable[..., float], *columns: Sequence[float], seed: int) -> dict[str, float] | None:
    estimate: Estimate | None = bootstrap(statistic, *columns, seed=seed)
    return estimate._asdict() if estimate else None
