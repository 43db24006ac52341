"""Predictions of every layer, shown: means, HTML, tables for a terminal and a picture."""

import io
import json
import re
import sys

import numpy as np
import pytest
from rich.console import Console

from lsjax.errors import UserError
from lsjax.reports.layer_grid import color_on_white, visible
from lsjax.reports.layer_predictions import LayerPredictions

WORDS = [" the", "<b>&", "\n", r"$\frac$ [red]", "\x1b[31m", "猫猫猫猫猫猫", "\u202ea", "extraordinarily", "\\frac", ""]


class Words:
    """A tokenizer of ten words."""

    def describe(self, index):
        return WORDS[index]


def predictions(layers=3, length=6, prompt=4) -> LayerPredictions:
    random = np.random.default_rng(0)
    return LayerPredictions(
        tokens=random.integers(0, 10, (layers, length)).astype(np.int32),
        probabilities=random.uniform(size=(layers, length)).astype(np.float32),
        text_tokens=(np.arange(length) % 10).astype(np.int32),
        prompt_length=prompt,
        tokenizer=Words(),
    )


def by_hand(**changed) -> LayerPredictions:
    tokens = np.array([[1, 5, 5, 2], [1, 4, 5, 3], [1, 5, 5, 3]])
    fields = {"probabilities": np.ones((3, 4)), "text_tokens": np.array([0, 1, 5, 5]), "prompt_length": 2}
    return LayerPredictions(**{"tokens": tokens, "tokenizer": Words(), **fields, **changed})


def test_means_are_over_what_is_predicted():
    """Position 0 predicts the prompt's second token, positions 1 and 2 the two new ones, and 3 what would follow."""
    found = by_hand()
    assert found.settled_at.tolist() == [1, 3, 1, 2]
    assert found.mean_layers == 1.75
    assert found.mean_layers_prompt == 1.0
    assert found.mean_layers_continuation == 2.0
    assert found.continuation.tolist() == [5, 5]
    assert found.summary() == "settled on average at layer 1.75 of 3 (prompt: 1.00, continuation: 2.00)"
    alone = by_hand(prompt_length=4)
    assert (alone.mean_layers_prompt, alone.mean_layers_continuation) == (pytest.approx(5 / 3), None)
    assert alone.summary() == "settled on average at layer 1.75 of 3 (prompt: 1.67)"
    one = LayerPredictions(np.array([[1]]), np.ones((1, 1)), np.array([0]), 1, Words())
    assert one.summary() == "settled on average at layer 1.00 of 1"


def test_a_result_prints_in_one_short_line_and_cannot_be_changed():
    found = predictions()
    assert repr(found).startswith("LayerPredictions(4 tokens of prompt, 2 new; settled on average at layer ")
    assert len(repr(found)) < 200
    with pytest.raises(AttributeError):
        found.prompt_length = 3


def test_the_report_is_json_with_everything():
    report = json.loads(json.dumps(predictions().report()))
    assert np.array(report["tokens"]).shape == np.array(report["probabilities"]).shape == (3, 6)
    assert report["texts"] == WORDS[:6]
    assert report["predicted_texts"] == [[WORDS[token] for token in row] for row in report["tokens"]]
    assert report["settled_at"] == predictions().settled_at.tolist()


def test_signs_stand_for_what_cannot_be_seen():
    assert visible(" a  b") == "·a··b"
    assert visible("\n\r\t") == "↵←→"
    assert visible("\x1b[31m\u202e\x00") == "\ufffd[31m\ufffd\ufffd"


def test_html_has_a_row_per_layer_and_holds_no_markup_of_tokens():
    found = predictions()
    page = found._repr_html_()
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    assert len(rows) == 1 + 3 + 1
    assert [row.count("<td") for row in rows] == [0, 6, 6, 6, 6]
    assert "<b>" not in page
    assert "&lt;b&gt;&amp;" in page
    assert found.summary() in page
    assert page.count("outline:1px") == 6  # the layer that settles, once per position
    agreeing = np.count_nonzero(found.tokens == found.tokens[-1])
    assert page.count("rgba(46,160,67,") == agreeing
    assert page.count("rgba(230,126,34,") == 18 - agreeing


def test_a_notebook_shows_the_last_positions_of_a_long_text():
    found = predictions(2, 100, 90)
    page = found._repr_html_()
    assert "positions 37 to 100 of 100" in page
    assert page.count("<td") == 3 * 64
    assert found.to_html(10, 13).count("<td") == 3 * 3
    assert "positions 11 to 13 of 100" in found.to_html(10, 13)
    assert found.to_html(None).count("<td") == 3 * 100
    assert found.grid(5, 2).texts == []


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_tables_fit_the_terminal_and_show_every_position_once(width):
    found = predictions(5, 23, 20)
    console = Console(file=io.StringIO(), width=width)
    console.print(found)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    settled = [line.split()[1:] for line in lines if line.startswith("settled")]
    assert [int(layer) for block in settled for layer in block] == found.settled_at.tolist()
    assert all(len(block) == max(1, (width - 7) // 9) for block in settled[:-1])
    assert sum(re.match(r" {6}[1-5]( |$)", line) is not None for line in lines) == 5 * len(settled)
    assert "\x1b" not in console.file.getvalue()


def test_cells_are_coloured_on_a_terminal():
    found = by_hand(probabilities=np.full((3, 4), 0.5))
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="truecolor")
    console.print(found)
    shown = console.file.getvalue()
    green, orange = (";".join(map(str, color_on_white(agrees, 0.5))) for agrees in (True, False))
    assert shown.count(f"48;2;{green}m") == 10
    assert shown.count(f"48;2;{orange}m") == 2
    assert color_on_white(True, 1.0)[0] < color_on_white(True, 0.1)[0]


def test_the_picture_is_a_png(tmp_path):
    found = predictions(4, 12, 8)
    found.save_png(tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    figure = found.plot(-4)
    (axes,) = figure.axes
    assert axes.images[0].get_array().shape == (4, 4, 3)
    assert len(axes.texts) == 16
    assert len(axes.patches) == 4
    with pytest.raises(UserError, match="cannot write"):
        found.save_png(tmp_path / "nowhere" / "layers.png")


def test_a_picture_without_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "lsjax.reports.layer_figure", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"needs matplotlib: .* lsjax\[plot\]"):
        predictions().plot()
