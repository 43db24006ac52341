"""Evaluates a model task by task and strategy by strategy, and resumes from its report."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lsjax.benchmarks.quality import (
    Note,
    TaskRun,
    held_out_windows,
    measure_held_out_text,
    measure_task,
)
from lsjax.decoding.batch import GenerationConfig, check_whole_number
from lsjax.decoding.forward import cache_dtype
from lsjax.decoding.model import Model
from lsjax.decoding.strategies import (
    AUTOREGRESSIVE,
    INT8,
    EarlyExit,
    SelfSpeculative,
    Strategy,
    check_strategy,
    is_auto,
)
from lsjax.errors import UserError
from lsjax.evaluation.tasks.held_out_text import HeldOutText, Window
from lsjax.evaluation.tasks.task import Example, Task
from lsjax.files import read_json, write_atomically
from lsjax.tuning.cost_model import candidates, measure_settings, vocabularies
from lsjax.tuning.tuned_settings import BOTH_AUTO

_FORMAT = "lsjax evaluation 1"
_AUTOREGRESSIVE = AUTOREGRESSIVE.name


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The settings of an evaluation, apart from the model, the tasks and the strategies.

    num_examples: examples per task, chosen at random by the seed; None takes all.
    max_new_tokens: the most new tokens per example; None leaves each task its own number.
    batch_size: examples decoded side by side. seed: of the choice of examples and of the confidence intervals.
    """

    num_examples: int | None = None
    max_new_tokens: int | None = None
    batch_size: int = 1
    seed: int = 0

    def __post_init__(self):
        if self.num_examples is not None:
            check_whole_number("num_examples", self.num_examples, least=1)


def parse_strategy(text: str, num_layers: int) -> Strategy:
    """Returns the strategy of "autoregressive", "early_exit:E", "self_speculative:E:d[:k]" or "auto".

    k: drafts choose among the k most frequent tokens.
    Raises UserError for any other text, and for a number out of range.
    """
    name, *numbers = text.split(":")
    if text == "auto":
        return BOTH_AUTO
    try:
        settings = [int(number) for number in numbers]
        if name == _AUTOREGRESSIVE and not settings:
            return AUTOREGRESSIVE
        kind = {EarlyExit.name: EarlyExit, SelfSpeculative.name: SelfSpeculative}[name]
        names = ("exit_layer", "num_speculations", "draft_vocabulary")[: len(settings)]
        strategy = kind(**dict(zip(names, settings, strict=True)))
    except (KeyError, TypeError, ValueError):
        known = "autoregressive, early_exit:E, self_speculative:E:d[:k] or auto"
        raise UserError(f"--strategies: {text!r} is none of {known}, where E, d and k are numbers") from None
    check_strategy(strategy, num_layers)
    return strategy


def evaluate(
    model: Model,
    tasks: dict[str, Task | HeldOutText],
    strategies: Sequence[str],
    config: EvaluationConfig,
    report_path: Path | None = None,
    note: Note = print,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measures every task with every strategy, and returns the report: settings, and a row for each pair.

    tasks: by their names. strategies: as `parse_strategy` reads them. Autoregressive decoding always runs first,
      because speed-ups and equal texts compare with it.
    report_path: a file that is written after each row. If it holds rows of these settings, they are not measured again.
    note: receives lines of progress. settings: more settings that must be the same when a report is continued.

    Raises UserError when the file holds an evaluation with other settings, and InexactError when a self-speculative
    text in float32 is not the autoregressive one.
    """
    names = [_AUTOREGRESSIVE, *(name for name in dict.fromkeys(strategies) if name != _AUTOREGRESSIVE)]
    parsed = {name: parse_strategy(name, model.config.num_layers) for name in names}
    report = _open_report(report_path, _all_settings(model, config) | (settings or {}))
    inputs = {name: _prepare(model, name, task, config, note) for name, task in tasks.items()}
    for name, prepared in inputs.items():
        _check_same_examples(report, name, prepared, report_path)
    total, number = len(names) * len(tasks), 0
    for task_name, prepared in inputs.items():
        for strategy_name, strategy in parsed.items():
            number += 1
            if find_row(report, task_name, strategy_name):
                note(f"[{number}/{total}] {task_name}, {strategy_name}: in the report already")
                continue
            note(f"[{number}/{total}] {task_name}, {strategy_name}")
            row = prepared.measure(model, strategy, find_row(report, task_name, _AUTOREGRESSIVE), note)
            report["rows"].append(
                {"strategy": strategy_name, "sha256": prepared.fingerprint, "too_long": prepared.too_long} | row
            )
            if report_path:
                write_atomically(report_path, json.dumps(report, indent=1))
    return report


def find_row(report: dict[str, Any], task: str, strategy: str) -> dict[str, Any] | None:
    """Returns the row of a task and a strategy, both by name, or None."""
    return next((row for row in report["rows"] if (row["task"], row["strategy"]) == (task, strategy)), None)


@dataclasses.dataclass(frozen=True)
class _Prompts:
    """The chosen examples of a task. too_long: examples left out because they do not fit into the model's context."""

    run: TaskRun
    too_long: int

    @property
    def fingerprint(self) -> str:
        return _sha256(self.run.examples)

    def measure(self, model: Model, strategy: Strategy, autoregressive: dict[str, Any] | None, note: Note) -> dict:
        if is_auto(strategy):
            strategy = _tuned(model, self.run, note)
        return measure_task(model, self.run, strategy, autoregressive, note)


@dataclasses.dataclass(frozen=True)
class _Windows:
    """The chosen windows of a held-out text."""

    name: str
    windows: Sequence[Window]
    seed: int
    too_long: int = 0

    @property
    def fingerprint(self) -> str:
        return _sha256([window.batch.tokens.tolist() for window in self.windows])

    def measure(self, model: Model, strategy: Strategy, autoregressive: dict[str, Any] | None, note: Note) -> dict:
        if is_auto(strategy):  # its text is the full model's, whatever it drafts with
            strategy = AUTOREGRESSIVE
        return measure_held_out_text(model, self.name, self.windows, strategy, self.seed, note)


def _prepare(
    model: Model, name: str, task: Task | HeldOutText, config: EvaluationConfig, note: Note
) -> _Prompts | _Windows:
    """Reads a task and chooses its examples."""
    generator = np.random.default_rng(config.seed)
    if isinstance(task, HeldOutText):
        windows = held_out_windows(model, task)
        chosen = sorted(generator.permutation(len(windows))[: config.num_examples].tolist())
        return _Windows(name, [windows[index] for index in chosen], config.seed)
    new_tokens = config.max_new_tokens or task.max_new_tokens
    request = GenerationConfig(new_tokens, stop=task.stop, batch_size=config.batch_size)
    examples = task.examples()
    order = generator.permutation(len(examples)).tolist()
    chosen, too_long = _choose(model, examples, order, config.num_examples, new_tokens)
    if not chosen:
        raise UserError(
            f"{name}: no example fits into the model's context of {model.config.context_length} tokens with "
            f"{new_tokens} new ones: lower --max_new_tokens or --num_shots"
        )
    if too_long:
        note(f"{name}: left out {too_long} example(s) that are too long for the model's context")
    return _Prompts(TaskRun(name, task, chosen, request, config.seed), too_long)


def _choose(
    model: Model, examples: Sequence[Example], order: Sequence[int], count: int | None, new_tokens: int
) -> tuple[list[Example], int]:
    """Returns (the first `count` examples in `order` that fit into the context, in file order; how many did not)."""
    chosen: list[int] = []
    too_long = 0
    for index in order:
        if len(chosen) == count:
            break
        length = len(model.tokenizer.encode(examples[index].prompt))
        if 0 < length <= model.config.context_length - new_tokens:
            chosen.append(index)
        else:
            too_long += 1
    return [examples[index] for index in sorted(chosen)], too_long


def _tuned(model: Model, run: TaskRun, note: Note) -> Strategy:
    """Returns the setting that is predicted to be the fastest for a task's prompts; autoregressive where none is."""
    exit_layers, num_speculations = candidates(BOTH_AUTO, model.config.num_layers)
    choices = vocabularies(BOTH_AUTO, model)
    tuning = measure_settings(model, run.batches(model), exit_layers, num_speculations, note, choices)
    if tuning is None:
        return AUTOREGRESSIVE
    note(str(tuning))
    return tuning.strategy if tuning.predicted_speedup > 1 else AUTOREGRESSIVE


def _all_settings(model: Model, config: EvaluationConfig) -> dict[str, Any]:
    """Returns what rows of one report have in common."""
    weights = model.decoder_weights()
    return {
        "model": model.path,
        "adapter": model.adapter,
        "step": model.step,
        "weights": INT8 if model.in_int8 else str(weights["embed"].dtype),
        "cache": str(cache_dtype(weights, model.cache)),
        "kernels": model.kernels,
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()})",
        "devices": len(weights["embed"].sharding.device_set),
        "jax_version": jax.__version__,
        **dataclasses.asdict(config),
    }


def _open_report(path: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the report at `path`, or a new one. Raises UserError for one of other settings or another kind."""
    if path is None or not path.exists():
        return {"format": _FORMAT, "settings": settings, "rows": []}
    report = read_json(path)
    rows = report.get("rows")
    whole = isinstance(report.get("settings"), dict) and isinstance(rows, list) and all(map(_is_row, rows))
    if report.get("format") != _FORMAT or not whole:
        raise UserError(f"--report {path} is no report of lsjax evaluate: give another file")
    for key, value in settings.items():
        old = report["settings"].get(key)
        if old != value:
            raise UserError(
                f"--report {path} holds an evaluation with {key} {old!r}, and this one has {value!r}: use the same "
                "settings, or another file"
            )
    return report


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("task", "strategy", "sha256"))


def _check_same_examples(report: dict[str, Any], name: str, prepared: _Prompts | _Windows, path: Path | None) -> None:
    """Raises UserError when the report has rows of a task with other examples."""
    others = [row for row in report["rows"] if row["task"] == name and row["sha256"] != prepared.fingerprint]
    if others:
        raise UserError(f"--report {path} holds {name} with other examples: its files have changed; give another file")


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
