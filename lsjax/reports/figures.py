"""Figures of results: loss and agreement by exit, speed and acceptance by setting."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from lsjax.errors import UserError
from lsjax.evaluation.exits import ExitProfile
from lsjax.files import write_atomically

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import PercentFormatter
except ImportError:
    raise UserError(
        "drawing figures needs matplotlib: pip install 'matplotlib>=3.11', or install lsjax[plot]"
    ) from None


_PAIR = ("tab:gray", "tab:blue")  # before, after


def draw_before_and_after(path: Path, before: dict[str, Any], after: dict[str, Any], title: str) -> None:
    """Writes a PNG with four panels: loss and agreement by exit layer, and speed by setting, greedy and sampled.

    before, after: {"profile": lists by name of ExitProfile, "decoding": {name: decoding report}}.
    """
    figure, axes = plt.subplots(1, 2 + len(before["decoding"]), figsize=(18, 4.6), layout="constrained")
    figure.suptitle(title)
    trees = {"before LayerSkip": before, "after": after}
    for place, key, text in ((0, "loss", "Loss (nats per token)"), (1, "agreement", "Agreement with the last layer")):
        for color, (name, tree) in zip(_PAIR, trees.items(), strict=True):
            layers = tree["profile"]["exit_layers"]
            axes[place].plot(layers, tree["profile"][key], "o-", color=color, label=name)
        axes[place].set(title=text, xlabel="exit layer", xticks=layers, ylim=(0, None))
    axes[0].legend()
    axes[1].yaxis.set_major_formatter(PercentFormatter(1.0))
    for place, name in enumerate(before["decoding"], start=2):
        _draw_speeds(axes[place], [tree["decoding"][name] for tree in trees.values()], name)
    save_figure(figure, path)


def _draw_speeds(axes: Axes, reports: list[dict[str, Any]], name: str) -> None:
    """Draws the speed-up of each setting before and after as bars, with the share of accepted drafts on them."""
    height = 0.38
    for index, (color, report) in enumerate(zip(_PAIR, reports, strict=True)):
        runs = [run for run in report["runs"] if run["strategy"] == "self_speculative"]
        places = np.arange(len(runs)) + (index - 0.5) * height
        axes.barh(places, [run["speedup"] or 0.0 for run in runs], height, color=color)
        for place, run in zip(places, runs, strict=True):
            accepted = "" if run["acceptance_rate"] is None else f"{run['acceptance_rate']:.0%} accepted"
            axes.text(0.03, place, accepted, va="center", fontsize=8, color="white")
        names = [
            f"E={run['exit_layer']}, d={run['num_speculations']}{', copies' * bool(run['lookup'])}" for run in runs
        ]
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set(
        title=f"Speed-up over autoregressive, {name} (E: exit layer, d: drafts)",
        yticks=range(len(names)),
        yticklabels=names,
    )
    axes.invert_yaxis()


def draw_comparison(path: Path, profiles: dict[str, ExitProfile]) -> None:
    """Writes a PNG with loss and agreement by exit layer, one line per model."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for name, profile in profiles.items():
        left.plot(profile.exit_layers, profile.loss, "o-", label=name)
        right.plot(profile.exit_layers, profile.agreement, "o-", label=name)
    left.set(title="Held-out loss", xlabel="exit layer", ylabel="nats per token", ylim=(0, None))
    right.set(title="Agreement with the last layer", xlabel="exit layer", ylim=(0, 1.02))
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    left.legend()
    save_figure(figure, path)


def draw_sweep(path: Path, report: dict[str, Any], title: str) -> None:
    """Writes a PNG with the speed-up of each setting, measured and predicted; the best of each is outlined."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    figure.suptitle(title)
    runs = _grid_runs(report)
    _draw_grid(left, runs, "speedup", "Speed-up over autoregressive, measured", "{:.2f}")
    _draw_grid(right, runs, "predicted_speedup", "The same, predicted", "{:.2f}")
    save_figure(figure, path)


def _grid_runs(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the runs of a grid over exit layers and draft lengths, without those that also copy drafts."""
    return [run for run in report["runs"] if run["strategy"] == "self_speculative" and not run["lookup"]]


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG, and frees its memory."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    write_atomically(path, buffer.getvalue())


def _draw_grid(axes: Axes, runs: list[dict[str, Any]], key: str, title: str, spec: str) -> None:
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
        axes.add_patch(Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, fill=False, edgecolor="red", linewidth=3))
    for (row, column), value in np.ndenumerate(grid):
        if np.isfinite(value):
            color = "white" if value < middle else "black"
            axes.text(column, row, spec.format(value), ha="center", va="center", color=color)
    axes.set(title=title, xlabel="drafted tokens per round", ylabel="exit layer")
    axes.set(xticks=range(len(drafts)), xticklabels=drafts, yticks=range(len(exits)), yticklabels=exits)
