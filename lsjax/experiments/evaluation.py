"""Evaluates a model task by task with strategies that take turns, and resumes from its report."""

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
    StrategyRecords,
    TaskRun,
    check_records,
    decode_in_turns,
    held_out_windows,
    measure_held_out_text,
    task_row,
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
from lsjax.experiments.evaluation_report import Report, open_report
from lsjax.files import own_results, path_of
from lsjax.reports.evaluation import chosen_strategy
from lsjax.tuning.choices import choices_of
from lsjax.tuning.cost_model import measure_settings
from lsjax.tuning.tuned_settings import BOTH_AUTO

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
    """Returns the strategy of "autoregressive", "early_exit:E", "self_speculative:E:d[:k][:int8]" or "auto".

    k: drafts choose among the k most frequent tokens. int8: they come from int8 copies of the early layers.
    Raises UserError for any other text, and for a number out of range.
    """
    name, *numbers = text.split(":")
    if text == "auto":
        return BOTH_AUTO
    try:
        in_int8 = name == SelfSpeculative.name and numbers[-1:] == [INT8]
        settings = [int(number) for number in (numbers[:-1] if in_int8 else numbers)]
        if name == _AUTOREGRESSIVE and not settings:
            return AUTOREGRESSIVE
        kind = {EarlyExit.name: EarlyExit, SelfSpeculative.name: SelfSpeculative}[name]
        names = ("exit_layer", "num_speculations", "draft_vocabulary")[: len(settings)]
        drafts = {"draft_weights": INT8} if in_int8 else {}
        strategy = kind(**dict(zip(names, settings, strict=True)), **drafts)
    except (KeyError, TypeError, ValueError):
        known = "autoregressive, early_exit:E, self_speculative:E:d[:k][:int8] or auto"
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

    tasks: by their names. strategies: as `parse_strategy` reads them. Autoregressive decoding always runs as well,
      because speed-ups and equal texts compare with it.
    report_path: a file that is written every ten seconds and after each task. What it holds of these settings is not
      measured again. When further strategies join it, autoregressive decoding runs again beside them.
    note: receives lines of progress. settings: more settings that must be the same when a report is continued.

    Raises UserError when the file holds an evaluation with other settings or other autoregressive texts, and
    InexactError when a self-speculative text in float32 is not the autoregressive one.
    """
    names = [_AUTOREGRESSIVE, *(name for name in dict.fromkeys(strategies) if name != _AUTOREGRESSIVE)]
    parsed = {name: parse_strategy(name, model.config.num_layers) for name in names}
    report = open_report(report_path, _all_settings(model, config) | (settings or {}))
    inputs = {name: _prepare(model, name, task, config, note) for name, task in tasks.items()}
    for name, prepared in inputs.items():
        report.check_same_examples(name, prepared.fingerprint)
    for number, (task_name, prepared) in enumerate(inputs.items(), 1):
        missing = {}
        for name, strategy in parsed.items():
            if report.find(task_name, name):
                note(f"{task_name}, {name}: in the report already")
            else:
                missing[name] = strategy
        if missing:
            note(f"[{number}/{len(inputs)}] {task_name}: {', '.join(missing)}")
            prepared.measure(model, missing, report, note)
    return report.content


@dataclasses.dataclass(frozen=True)
class _Prompts:
    """The chosen examples of a task. too_long: examples left out because they do not fit into the model's context."""

    run: TaskRun
    too_long: int

    @property
    def fingerprint(self) -> str:
        return _sha256(self.run.examples)

    def measure(self, model: Model, strategies: dict[str, Strategy], report: Report, note: Note) -> None:
        """Decodes the task with strategies that take turns, and adds their rows to the report."""
        run, measured = self.run, {}
        for name in dict.fromkeys([_AUTOREGRESSIVE, *strategies]):
            measured[name] = self._stored(model, name, report)
            if not measured[name]:
                strategy = strategies[name]
                measured[name] = StrategyRecords(_tuned(model, run, note) if is_auto(strategy) else strategy)
        if _AUTOREGRESSIVE not in strategies:
            note(f"{run.name}: autoregressive decoding runs again, because speed-ups compare with it")

        def rows() -> list[dict[str, Any]]:
            told = {"sha256": self.fingerprint, "too_long": self.too_long}
            return [{"strategy": name} | told | task_row(run, measured[name]) for name in strategies]

        decode_in_turns(model, run, measured, note, lambda: report.keep_unfinished(rows()))
        report.add(rows())

    def _stored(self, model: Model, name: str, report: Report) -> StrategyRecords | None:
        """Returns what the report has of a strategy, or None. Raises UserError when it is damaged."""
        row = report.find(self.run.name, name) or report.find_unfinished(self.run.name, name)
        if not row:
            return None
        with own_results(report.path or path_of("the report")):
            records, strategy = row["records"], parse_strategy(chosen_strategy(row), model.config.num_layers)
            stored = StrategyRecords(strategy, records, float(row["seconds"]), float(row["compile_seconds"]))
            check_records(self.run, records)
            return stored


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

    def measure(self, model: Model, strategies: dict[str, Strategy], report: Report, note: Note) -> None:
        """Measures the bits of each strategy, and adds its row to the report."""
        for name, strategy in strategies.items():
            if is_auto(strategy):  # its text is the full model's, whatever it drafts with
                strategy = AUTOREGRESSIVE
            row = measure_held_out_text(model, self.name, self.windows, strategy, self.seed, note)
            report.add([{"strategy": name, "sha256": self.fingerprint, "too_long": self.too_long} | row])


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
    tuning = measure_settings(model, run.batches(model), choices_of(BOTH_AUTO, model), note)
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


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
