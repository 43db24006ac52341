"""Models, results and profiles as tables of a notebook, and its progress bar."""

import os
import signal
import sys
import threading
import time
import types
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from lsjax.decoding.model import Model
from lsjax.decoding.results import GenerateResult
from lsjax.decoding.strategies import SelfSpeculative
from lsjax.evaluation.exits import ExitProfile
from lsjax.generation import generate
from lsjax.notebook import html_table
from lsjax.training.progress import ProgressDisplay
from tests.helpers.prompts import PROMPTS, NoTokenizer


class Cells(HTMLParser):
    """Collects the text of the cells of a table, row by row."""

    def __init__(self, text: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows:
            self.rows[-1][-1] += data


def test_a_result_is_a_table_of_its_texts():
    stats = [{"finish_reason": "length", "acceptance_rate": 0.51234, "tokens_per_second": 123.456}]
    result = GenerateResult([[1, 2, 3]], ["<b>a & b</b>\n"], stats)
    assert Cells(result._repr_html_()).rows[1] == ["<b>a & b</b>\n", "3", "length", "0.5123", "123.5"]


def test_a_profile_is_a_table_of_its_exits():
    profile = ExitProfile(np.array([1, 4]), np.array([3.25, 2.0]), np.array([0.5, 0.75]), np.array([0.25, 1.0]))
    assert Cells(profile._repr_html_()).rows[1:] == [["1", "3.25", "0.5", "0.25"], ["4", "2", "0.75", "1"]]
    assert repr(profile) == "ExitProfile(loss by exit layer: 1: 3.250, 4: 2.000)"


def test_a_model_is_a_short_table(varied, varied_params):
    model = Model(varied, varied_params, NoTokenizer())
    assert len(repr(model)) < 200
    assert ["heads, KV heads, head width", "4, 2, 8"] in Cells(model._repr_html_()).rows


def test_an_empty_cell_is_empty():
    assert Cells(html_table(("a", "b"), [(None, 0)])).rows == [["a", "b"], ["", "0"]]


def test_training_in_a_notebook_replaces_one_line(monkeypatch, capsys):
    """The display handle is a recorder: IPython itself runs in the tests of the notebooks."""
    shown = []

    class Handle:
        def update(self, data, raw):
            shown.append(data)

    display = types.ModuleType("IPython.display")
    display.display = lambda data, raw, display_id: Handle()
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(Console, "is_jupyter", True, raising=False)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    progress = ProgressDisplay(0, 8)
    for step in (1, 4):
        progress.update({"step": step, "final_loss": 2.5, "tokens_per_second": 10.0})
    progress.close()
    assert [data["text/plain"].split("  ")[0] for data in shown] == ["step 1/8", "step 4/8"]
    assert 'value="0.5000"' in shown[1]["text/html"]
    assert "step" not in capsys.readouterr().out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_shown(value):
    assert Cells(html_table(("a",), [(value,)])).rows[1] == [str(value)]


def test_an_interrupted_generate_raises_and_the_next_one_is_whole(varied, varied_params):
    """The interrupt button of a notebook sends SIGINT to the kernel, which runs cells in its main thread."""
    model = Model(varied, varied_params, NoTokenizer())
    strategy = SelfSpeculative(2, 3)
    expected = generate(model, PROMPTS, 32, strategy).tokens

    def generate_for_a_minute():
        end = time.monotonic() + 60
        while time.monotonic() < end:
            generate(model, PROMPTS, 32, strategy)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores SIGINT
    try:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            generate_for_a_minute()
    finally:
        signal.signal(signal.SIGINT, before)
    assert generate(model, PROMPTS, 32, strategy).tokens == expected
