"""A grid of self-speculation measured setting by setting, beside what the cost model predicts for each."""

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lsjax.decoding.benchmark import benchmark
from lsjax.decoding.strategies import Sampling, SelfSpeculative, Strategy, check_strategy
from lsjax.decoding.tuning import tune_over
from lsjax.errors import UserError
from lsjax.evaluation.figures import draw_sweep
from lsjax.files import make_folder, write_atomically
from lsjax.loading import Model

_COLUMNS = (
    "exit_layer", "num_speculations", "speedup", "predicted_speedup", "tokens_per_round", "predicted_tokens_per_round",
    "acceptance_rate", "ms_per_token", "tokens_per_second", "matches_autoregressive",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Grid:
    """Every exit layer with every draft length."""

    exit_layers: tuple[int, ...]
    num_speculations: tuple[int, ...]

    def check_settings(self, num_layers: int) -> None:
        """Raises UserError before anything is measured on a grid that cannot be."""
        if not self.exit_layers or not self.num_speculations:
            raise UserError("a grid needs at least one exit layer and one number of speculations")
        for strategy in self.strategies():
            check_strategy(strategy, num_layers)

    def strategies(self) -> list[Strategy]:
        return [SelfSpeculative(e, d) for e in self.exit_layers for d in self.num_speculations]


def default_exit_layers(num_layers: int) -> tuple[int, ...]:
    """An eighth of the layers, a quarter, three eighths and a half."""
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
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    seed: int = 0,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measures the grid; leaves sweep.csv and sweep.png in `folder`. Returns the report of `benchmark`, predictions
    among it."""
    grid.check_settings(model.config.num_layers)
    folder = make_folder(Path(folder), "--sweep folder")
    pair = sorted(set(grid.exit_layers)), sorted(set(grid.num_speculations))
    tuning = tune_over(model, prompts, *pair, max_new_tokens, batch_size, sampling, seed, note)
    report = benchmark(
        model,
        prompts,
        Grid(*map(tuple, pair)).strategies(),
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
    """A line a self-speculative run; what was not measured is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(run for run in report["runs"] if run["strategy"] == "self_speculative")
    return text.getvalue()


def summary(report: dict[str, Any]) -> str:
    """One sentence: the best self-speculative setting, and whether its tokens are the full model's."""
    runs = [run for run in report["runs"] if run["strategy"] == "self_speculative"]
    best = max(runs, key=lambda run: run["speedup"] or 0.0)
    if best["speedup"] is None:
        return "every text ended with its first token: there is no speed to compare"
    sentence = (
        f"self-speculation is fastest with exit layer {best['exit_layer']} and {best['num_speculations']} drafts"
        f"{_copied(best)}: "
        f"{best['speedup']:.2f} times autoregressive, {best['acceptance_rate']:.0%} of drafts accepted"
    )
    if best["matches_autoregressive"] is None:  # sampled
        return sentence
    same = "all settings gave" if all(run["matches_autoregressive"] for run in runs) else "NOT all settings gave"
    return f"{sentence}; {same} autoregressive's exact tokens"
