"""Measures a grid of self-speculative settings, beside what the cost model predicts for each."""

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lsjax.benchmarks.decoding import benchmark
from lsjax.decoding.batch import GenerationConfig
from lsjax.decoding.model import Model
from lsjax.decoding.strategies import GREEDY, Sampling, SelfSpeculative, Strategy, check_strategy
from lsjax.errors import UserError
from lsjax.files import disk_path, make_folder, write_atomically
from lsjax.reports.figures import draw_sweep
from lsjax.tuning.choices import Choices
from lsjax.tuning.tune import tune_over

_COLUMNS = (
    "exit_layer", "num_speculations", "speedup", "predicted_speedup", "tokens_per_round", "predicted_tokens_per_round",
    "acceptance_rate", "ms_per_token", "tokens_per_second", "matches_autoregressive", "repetition",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Grid:
    """A grid of self-speculative settings: every exit layer with every number of drafts."""

    exit_layers: tuple[int, ...]
    num_speculations: tuple[int, ...]

    def check(self, num_layers: int) -> None:
        """Raises UserError for an empty grid, or one with a setting that the model does not have."""
        if not self.exit_layers or not self.num_speculations:
            raise UserError("a grid needs at least one exit layer and one number of drafts")
        for strategy in self.strategies():
            check_strategy(strategy, num_layers)

    def strategies(self) -> list[Strategy]:
        """Lists the settings, by exit layer, then by number of drafts."""
        return [SelfSpeculative(e, d) for e in self.exit_layers for d in self.num_speculations]


def default_exit_layers(num_layers: int) -> tuple[int, ...]:
    """Returns an eighth, a quarter, three eighths and a half of the layers, without duplicates."""
    return tuple(sorted({max(1, num_layers * eighths // 8) for eighths in (1, 2, 3, 4)}))


def sweep(
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    grid: Grid,
    folder: str | Path,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 1,
    repeats: int = 3,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measures the grid, writes sweep.csv and sweep.png to `folder`, and returns the report of `benchmark`.

    The report holds the cost model's predictions. The other arguments are those of `benchmark`.
    """
    grid.check(model.config.num_layers)
    folder = make_folder(disk_path(folder, "--sweep"), "--sweep folder")
    grid = Grid(tuple(sorted(set(grid.exit_layers))), tuple(sorted(set(grid.num_speculations))))
    request = GenerationConfig(max_new_tokens, sampling, seed, batch_size=batch_size)
    tuning = tune_over(model, prompts, Choices(grid.exit_layers, grid.num_speculations), request, note)
    report = benchmark(
        model,
        prompts,
        grid.strategies(),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        repeats=repeats,
        sampling=sampling,
        seed=seed,
        note=note,
        tuning=tuning,
    )
    write_atomically(folder / "sweep.csv", as_csv(report))
    draw_sweep(folder / "sweep.png", report, f"Self-speculation on {report['device']}, batch of {batch_size}")
    return report


def _copied(run: dict[str, Any]) -> str:
    return f", or {run['lookup']} copied where the text repeats itself" if run["lookup"] else ""


def as_csv(report: dict[str, Any]) -> str:
    """Returns the self-speculative runs as CSV, one line per run; a value that was not measured is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(run for run in report["runs"] if run["strategy"] == "self_speculative")
    return text.getvalue()


def summary(report: dict[str, Any]) -> str:
    """Returns one sentence on the fastest self-speculative setting, and on whether all gave the full model's tokens."""
    runs = [run for run in report["runs"] if run["strategy"] == "self_speculative"]
    best = max(runs, key=lambda run: run["speedup"] or 0.0)
    if best["speedup"] is None:
        return "every text ended with its first token, so there is no speed to compare"
    sentence = (
        f"self-speculation is fastest with exit layer {best['exit_layer']} and {best['num_speculations']} drafts"
        f"{_copied(best)}: "
        f"{best['speedup']:.2f} times autoregressive, {best['acceptance_rate']:.0%} of drafts accepted"
    )
    if best["matches_autoregressive"] is None:  # sampled
        return sentence
    same = "all settings gave" if all(run["matches_autoregressive"] for run in runs) else "NOT all settings gave"
    return f"{sentence}; {same} autoregressive's exact tokens"
