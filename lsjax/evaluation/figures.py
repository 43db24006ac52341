"""The picture of a run: loss by exit, speed and acceptance by setting."""

import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from lsjax.evaluation.exits import ExitProfile
from lsjax.files import write_atomically

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def draw_run(path: Path, profile: ExitProfile, report: dict[str, Any], title: str) -> None:
    """Writes a PNG with three panels from an exit profile and a decoding report over a grid of settings."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    figure.suptitle(title)
    _draw_exits(left, profile)
    runs = _grid_runs(report)
    _draw_grid(middle, runs, "speedup", "Self-speculation: speed-up over autoregressive", "{:.2f}")
    _draw_grid(right, runs, "acceptance_rate", "Drafted tokens accepted", "{:.0%}")
    save_figure(figure, path)


def draw_comparison(path: Path, profiles: dict[str, ExitProfile]) -> None:
    """Writes a PNG: loss and agreement by exit layer, a line a model."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for name, profile in profiles.items():
        left.plot(profile.exit_layers, profile.loss, "o-", label=name)
        right.plot(profile.exit_layers, profile.agreement, "o-", label=name)
    left.set(title="Held-out loss", xlabel="exit layer", ylabel="nats a token", ylim=(0, None))
    right.set(title="Agreement with the last layer", xlabel="exit layer", ylim=(0, 1.02))
    right.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    left.legend()
    save_figure(figure, path)


def draw_sweep(path: Path, report: dict[str, Any], title: str) -> None:
    """Writes a PNG: speed-up by setting, as measured and as predicted, the best of each outlined."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    figure.suptitle(title)
    runs = _grid_runs(report)
    _draw_grid(left, runs, "speedup", "Speed-up over autoregressive, measured", "{:.2f}")
    _draw_grid(right, runs, "predicted_speedup", "The same, predicted", "{:.2f}")
    save_figure(figure, path)


def _grid_runs(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a grid over exit layers and draft lengths; a setting with copies as well is in no cell of it."""
    return [run for run in report["runs"] if run["strategy"] == "self_speculative" and not run["lookup"]]


def save_figure(figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    write_atomically(path, buffer.getvalue())


def _draw_exits(axes, profile: ExitProfile) -> None:
    layers = profile.exit_layers
    axes.plot(layers, profile.loss, "o-", color="tab:blue", label="loss")
    axes.set(title="Held-out text, exit by exit", xlabel="exit layer", ylabel="loss (nats a token)", xticks=layers)
    other = axes.twinx()
    other.plot(layers, profile.agreement, "s--", color="tab:orange", label="agrees with the last layer")
    other.set_ylim(0, 1.02)
    other.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    axes.legend(handles=[axes.lines[0], other.lines[0]], loc="center right")


def _draw_grid(axes, runs: list[dict[str, Any]], key: str, title: str, spec: str) -> None:
    exits = sorted({run["exit_layer"] for run in runs})
    drafts = sorted({run["num_speculations"] for run in runs})
    grid = np.full((len(exits), len(drafts)), np.nan)
    for run in runs:
        grid[exits.index(run["exit_layer"]), drafts.index(run["num_speculations"])] = (
            np.nan if run[key] is None else run[key]
        )
    axes.imshow(grid, cmap="viridis", aspect="auto")
    measured = np.isfinite(grid).any()
    middle = np.nanmean(grid) if measured else 0.0
    if measured:
        row, column = np.unravel_index(np.nanargmax(grid), grid.shape)
        axes.add_patch(plt.Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, fill=False, edgecolor="red", linewidth=3))
    for (row, column), value in np.ndenumerate(grid):
        if np.isfinite(value):
            color = "white" if value < middle else "black"
            axes.text(column, row, spec.format(value), ha="center", va="center", color=color)
    axes.set(title=title, xlabel="drafted tokens a round", ylabel="exit layer")
    axes.set(xticks=range(len(drafts)), xticklabels=drafts, yticks=range(len(exits)), yticklabels=exits)
