"""README is short and true: its example runs as it stands, and its table is the one in docs/results.md."""

import re
from pathlib import Path

import pytest

from lsjax.training.loop import train

pytestmark = pytest.mark.usefixtures("compilation_cache")

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def demo(tiny_run, tmp_path, monkeypatch):
    """A working directory where runs/demo is a trained model."""
    train(tiny_run, tmp_path / "runs" / "demo", verbose=False)
    monkeypatch.chdir(tmp_path)


def test_the_python_examples_of_readme_and_of_the_decoding_page_run(demo, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(example, {})
    assert capsys.readouterr().out

    page = (ROOT / "docs" / "decoding.md").read_text(encoding="utf-8")
    names: dict = {}
    for example in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(example, names)
    assert names["logits"].shape == (1, len(names["tokens"][0]), 320)
    assert names["states"].shape == (4, 1, len(names["tokens"][0]), 32)
    assert capsys.readouterr().out


def test_readme_generates_in_eight_lines():
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len([line for line in example.splitlines() if line]) <= 8


def test_readme_has_at_most_130_lines():
    assert README.count("\n") <= 130


def test_every_figure_in_readmes_table_stands_in_the_results():
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in README.partition("## Install")[0].splitlines() if line.startswith("| ")]
    assert len(rows) > 4
    assert set(rows) <= set(results)
