"""The result of `lsjax.layer_predictions`: numbers, and ways to look at them."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console, ConsoleOptions
from rich.table import Table

from lsjax.data.tokenizer import Tokenizer
from lsjax.evaluation.layers import settling_layers
from lsjax.reports.layer_grid import LayerGrid, grid_html, grid_tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_COLUMNS = 64  # positions that a notebook or a picture shows, unless it is asked for more


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LayerPredictions:
    """The predictions of every exit layer at every position of a text (the paper's Figure 2).

    tokens: the likeliest next token by exit layer l+1 after position s, int32 [L,S].
    probabilities: its probability, float32 [L,S].
    text_tokens: the text that was read, the prompt and its greedy continuation, int32 [S].
    prompt_length: how many of these tokens are the prompt.
    tokenizer: gives tokens their texts.

    The prediction at position s is a guess at token s+1 of the text; the last one looks past the text. A notebook shows
    the last positions as a table. `rich` prints all of them, in blocks as wide as the terminal.
    """

    tokens: np.ndarray
    probabilities: np.ndarray
    text_tokens: np.ndarray
    prompt_length: int
    tokenizer: Tokenizer

    @functools.cached_property
    def settled_at(self) -> np.ndarray:
        """The exit layer from which the prediction no longer changes up to the last layer, int [S], in 1..L."""
        return settling_layers(self.tokens)

    @property
    def mean_layers(self) -> float:
        """The mean of `settled_at` over all positions.

        For a Llama 1 7B and a HumanEval prompt the paper gives 23.45 of 32 layers per token.
        """
        return float(self.settled_at.mean())

    @property
    def mean_layers_prompt(self) -> float | None:
        """The mean over the predictions of the prompt's tokens; None for a prompt of one token."""
        return _mean(self.settled_at[: self.prompt_length - 1])

    @property
    def mean_layers_continuation(self) -> float | None:
        """The mean over the predictions of the continuation's tokens; None without a continuation."""
        return _mean(self.settled_at[self.prompt_length - 1 : -1])

    @property
    def continuation(self) -> np.ndarray:
        """The new tokens of the text."""
        return self.text_tokens[self.prompt_length :]

    @functools.cached_property
    def texts(self) -> list[str]:
        """The text of each token that was read, [S]."""
        return [self._text(token) for token in self.text_tokens.tolist()]

    @functools.cached_property
    def predicted_texts(self) -> list[list[str]]:
        """The texts of the predicted tokens, L lists of S texts."""
        return [[self._text(token) for token in row] for row in self.tokens.tolist()]

    @functools.cached_property
    def _known_texts(self) -> dict[int, str]:
        return {}

    def _text(self, token: int) -> str:
        if token not in self._known_texts:
            self._known_texts[token] = self.tokenizer.describe(token)
        return self._known_texts[token]

    def summary(self) -> str:
        """Returns one line with the means of `settled_at`."""
        parts = {"prompt": self.mean_layers_prompt, "continuation": self.mean_layers_continuation}
        known = ", ".join(f"{name}: {mean:.2f}" for name, mean in parts.items() if mean is not None)
        line = f"settled on average at layer {self.mean_layers:.2f} of {len(self.tokens)}"
        return f"{line} ({known})" if known else line

    def report(self) -> dict[str, Any]:
        """Returns everything as plain lists and numbers, for JSON."""
        return {
            "num_layers": len(self.tokens),
            "prompt_length": self.prompt_length,
            "text_tokens": self.text_tokens.tolist(),
            "texts": self.texts,
            "tokens": self.tokens.tolist(),
            "predicted_texts": self.predicted_texts,
            "probabilities": self.probabilities.tolist(),
            "settled_at": self.settled_at.tolist(),
            "mean_layers": self.mean_layers,
            "mean_layers_prompt": self.mean_layers_prompt,
            "mean_layers_continuation": self.mean_layers_continuation,
        }

    def grid(self, start: int | None = None, stop: int | None = None) -> LayerGrid:
        """Returns the positions start..stop-1, as a slice takes them, with their texts; by default all of them."""
        first, end, _ = slice(start, stop).indices(len(self.text_tokens))
        whole = LayerGrid(
            first=0,
            total=len(self.text_tokens),
            num_prompt=self.prompt_length,
            texts=self.texts,
            predicted=self.predicted_texts,
            probabilities=self.probabilities,
            agrees=self.tokens == self.tokens[-1],
            settled_at=self.settled_at,
        )
        return whole.columns(first, max(first, end))

    def to_html(self, start: int | None = -_MOST_COLUMNS, stop: int | None = None) -> str:
        """Returns an HTML table of the positions start..stop-1, as a slice takes them; by default the last 64."""
        return grid_html(self.grid(start, stop))

    def tables(self, width: int) -> list[Table]:
        """Returns tables for a terminal `width` characters wide, each with the positions that fit side by side."""
        return grid_tables(self.grid(), width)

    def plot(self, start: int | None = -_MOST_COLUMNS, stop: int | None = None) -> "Figure":
        """Returns a matplotlib figure of the positions start..stop-1, as a slice takes them; by default the last 64.

        Raises UserError when matplotlib is missing.
        """
        from lsjax.reports.layer_figure import draw_layers

        return draw_layers(self.grid(start, stop), self.summary())

    def save_png(self, path: str | Path, start: int | None = -_MOST_COLUMNS, stop: int | None = None) -> None:
        """Writes the figure of `plot` as a PNG file. Raises UserError when it cannot."""
        from lsjax.reports.layer_figure import save_png

        save_png(self.plot(start, stop), Path(path))

    def __repr__(self) -> str:
        counts = f"{self.prompt_length} tokens of prompt, {len(self.continuation)} new"
        return f"LayerPredictions({counts}; {self.summary()})"

    def _repr_html_(self) -> str:
        return f"{self.to_html()}<div>{self.summary()}</div>"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        yield from self.tables(options.max_width)


def _mean(layers: np.ndarray) -> float | None:
    return float(layers.mean()) if len(layers) else None
