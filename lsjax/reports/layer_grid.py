"""A window of the positions of a text with what each layer predicts there, as HTML and as tables for a terminal."""

import html
from typing import NamedTuple

import numpy as np
from rich.table import Table
from rich.text import Text

SETTLED = "settled"  # the name of the row of settling layers
AGREES, DIFFERS = (46, 160, 67), (230, 126, 34)  # green: predicts what the last layer predicts; orange: something else
_FAINTEST, _STRONGEST = 0.12, 0.8  # opacity of a colour at probability 0 and 1
_CELL = 8  # characters of a token on a terminal
_SIGNS = str.maketrans({" ": "·", "\n": "↵", "\r": "←", "\t": "→"})

_TABLE_STYLE = "border-collapse:collapse;font-family:monospace;font-size:11px;white-space:pre"
_SETTLED_STYLE = ";outline:1px solid currentColor;outline-offset:-1px;font-weight:bold"


class LayerGrid(NamedTuple):
    """The positions first..first+S-1 of a text, ready to show.

    first, total: the first position shown, and the positions of the whole text.
    num_prompt: how many of the positions shown are the prompt's.
    texts: the token at each position [S]. predicted: the texts of the predicted tokens, [L][S].
    probabilities: [L,S]. agrees: whether a prediction is the last layer's, [L,S].
    settled_at: the layer from which the prediction no longer changes, [S].
    """

    first: int
    total: int
    num_prompt: int
    texts: list[str]
    predicted: list[list[str]]
    probabilities: np.ndarray
    agrees: np.ndarray
    settled_at: np.ndarray

    def columns(self, start: int, stop: int) -> "LayerGrid":
        """Returns the part with the columns start..stop-1."""
        return LayerGrid(
            first=self.first + start,
            total=self.total,
            num_prompt=min(max(self.num_prompt - start, 0), stop - start),
            texts=self.texts[start:stop],
            predicted=[row[start:stop] for row in self.predicted],
            probabilities=self.probabilities[:, start:stop],
            agrees=self.agrees[:, start:stop],
            settled_at=self.settled_at[start:stop],
        )

    def title(self) -> str:
        """Returns a line that says which positions these are, counted from 1."""
        return f"positions {self.first + 1} to {self.first + len(self.texts)} of {self.total}"


def visible(text: str) -> str:
    """Returns the text of a token with signs for spaces and line breaks, and without control characters."""
    text = text.translate(_SIGNS)
    return "".join(sign if sign.isprintable() else "\ufffd" for sign in text)


def opacity(probability: float) -> float:
    """Returns how strong the colour of a cell is."""
    return _FAINTEST + (_STRONGEST - _FAINTEST) * float(probability)


def color_on_white(agrees: bool, probability: float) -> tuple[int, int, int]:
    """Returns the colour of a cell as red, green and blue in 0..255."""
    strength = opacity(probability)
    red, green, blue = (round(255 + (part - 255) * strength) for part in (AGREES if agrees else DIFFERS))
    return red, green, blue


def grid_html(grid: LayerGrid) -> str:
    """Returns a grid as an HTML table, one row per layer. Pointing at a cell shows its token and probability."""
    heads = [_html_cell(text, "", bold=index >= grid.num_prompt, tag="th") for index, text in enumerate(grid.texts)]
    rows = [f"<tr><th>layer</th>{''.join(heads)}</tr>"]
    for layer, texts in enumerate(grid.predicted, 1):
        cells = [_html_prediction(grid, layer, column, text) for column, text in enumerate(texts)]
        rows.append(f"<tr><th>{layer}</th>{''.join(cells)}</tr>")
    settled = "".join(f"<td>{layer}</td>" for layer in grid.settled_at)
    rows.append(f"<tr><th>{SETTLED}</th>{settled}</tr>")
    table = f'<table style="{_TABLE_STYLE}">{"".join(rows)}</table>'
    return f'<div style="overflow-x:auto"><div>{html.escape(grid.title())}</div>{table}</div>'


def _html_prediction(grid: LayerGrid, layer: int, column: int, text: str) -> str:
    probability, agrees = grid.probabilities[layer - 1, column], grid.agrees[layer - 1, column]
    red, green, blue = AGREES if agrees else DIFFERS
    style = f"background:rgba({red},{green},{blue},{opacity(probability):.2f})"
    style += _SETTLED_STYLE if layer == grid.settled_at[column] else ""
    return _html_cell(text, f"layer {layer}: {visible(text)}, probability {probability:.3f}", style=style)


def _html_cell(text: str, hint: str, style: str = "", bold: bool = False, tag: str = "td") -> str:
    style = f"text-align:left;padding:1px 4px;font-weight:{'bold' if bold else 'normal'};{style}"
    title = f' title="{html.escape(hint)}"' if hint else ""
    return f'<{tag} style="{style}"{title}>{html.escape(visible(text))}</{tag}>'


def grid_tables(grid: LayerGrid, width: int) -> list[Table]:
    """Returns a grid as tables that fit `width` characters of a terminal, each with the columns that fit."""
    fitting = max(1, (width - len(SETTLED)) // (_CELL + 1))
    count = len(grid.texts)
    starts = range(0, count, fitting)
    return [_terminal_table(grid.columns(start, min(start + fitting, count))) for start in starts]


def _terminal_table(grid: LayerGrid) -> Table:
    table = Table(title=grid.title(), title_justify="left", box=None, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column("layer", justify="right", width=len(SETTLED))
    for index, text in enumerate(grid.texts):
        style = "bold" if index >= grid.num_prompt else "dim"
        table.add_column(_terminal_cell(text, style), width=_CELL, no_wrap=True)
    for layer, texts in enumerate(grid.predicted, 1):
        cells = [_terminal_prediction(grid, layer, column, text) for column, text in enumerate(texts)]
        table.add_row(str(layer), *cells)
    table.add_row(SETTLED, *(str(layer) for layer in grid.settled_at))
    return table


def _terminal_prediction(grid: LayerGrid, layer: int, column: int, text: str) -> Text:
    red, green, blue = color_on_white(grid.agrees[layer - 1, column], grid.probabilities[layer - 1, column])
    marked = "bold underline " if layer == grid.settled_at[column] else ""
    return _terminal_cell(text, f"{marked}black on rgb({red},{green},{blue})")


def _terminal_cell(text: str, style: str) -> Text:
    cell = Text(visible(text), style=style)
    cell.truncate(_CELL, overflow="ellipsis", pad=True)
    return cell
