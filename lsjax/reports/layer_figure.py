"""A picture of what each layer predicts, like the paper's Figure 2."""

import io
import warnings
from pathlib import Path

import numpy as np

from lsjax.errors import UserError
from lsjax.files import write_atomically
from lsjax.reports.layer_grid import LayerGrid, color_on_white, visible

try:
    # Without pyplot, which would choose how a notebook shows figures.
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
except ImportError:
    raise UserError(
        "drawing figures needs matplotlib: pip install 'matplotlib>=3.11', or install lsjax[plot]"
    ) from None

_CHARACTERS = 9  # of a token that a cell shows
_CELL_INCHES = (0.66, 0.19)
_MARGIN_INCHES = (0.8, 1.1)


def draw_layers(grid: LayerGrid, title: str) -> Figure:
    """Returns a figure with one row per layer and one column per position. The layer that settles is outlined."""
    layers, columns = grid.agrees.shape
    wide, high = _CELL_INCHES
    size = columns * wide + _MARGIN_INCHES[0], layers * high + _MARGIN_INCHES[1]
    figure = Figure(figsize=(max(size[0], 4.0), size[1]), layout="constrained")
    axes = figure.add_subplot()
    colors = [
        [color_on_white(grid.agrees[row, column], grid.probabilities[row, column]) for column in range(columns)]
        for row in range(layers)
    ]
    axes.imshow(np.array(colors, np.uint8), aspect="auto")
    for row, texts in enumerate(grid.predicted):
        for column, text in enumerate(texts):
            _write(axes, column, row, text)
    for column, layer in enumerate(grid.settled_at):
        axes.add_patch(Rectangle((column - 0.5, layer - 1.5), 1, 1, fill=False, edgecolor="black", linewidth=1))
    axes.set_title(title, fontsize=9, parse_math=False)
    axes.set_ylabel("layer", fontsize=8)
    axes.set_yticks(range(layers), labels=[str(layer) for layer in range(1, layers + 1)], fontsize=6)
    axes.set_xticks(range(columns), labels=[_short(text) for text in grid.texts], rotation=60, fontsize=7)
    axes.xaxis.tick_top()
    for index, label in enumerate(axes.get_xticklabels()):
        label.set(parse_math=False, family="monospace", ha="left", rotation_mode="anchor")
        label.set_fontweight("bold" if index >= grid.num_prompt else "normal")
    axes.tick_params(length=0)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)  # a font does not have every script
        figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())


def _write(axes, column: int, row: int, text: str) -> None:
    # A token may hold dollar signs, which would begin a formula.
    axes.text(column, row, _short(text), ha="center", va="center", fontsize=6, family="monospace", parse_math=False)


def _short(text: str) -> str:
    shown = visible(text)
    return shown if len(shown) <= _CHARACTERS else shown[: _CHARACTERS - 1] + "…"
