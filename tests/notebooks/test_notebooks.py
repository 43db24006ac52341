"""The notebooks: the .ipynb files hold what the sources say and outputs of a whole run, and the sources run."""

import importlib.util
import re
import tomllib
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent.parent
RECORDED = ROOT / "tests" / "io" / "recorded"


def load_build():
    spec = importlib.util.spec_from_file_location("build_notebooks", ROOT / "notebooks" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BUILD = load_build()
NOTEBOOK = pytest.mark.parametrize("source", BUILD.SOURCES, ids=lambda path: path.stem)


def test_there_are_two_notebooks():
    assert [path.stem for path in BUILD.SOURCES] == ["own_model", "tour"]


@NOTEBOOK
def test_a_notebook_holds_its_source_and_the_outputs_of_one_run(source):
    path = source.with_suffix(".ipynb")
    stored, made = nbformat.read(path, 4), BUILD.read_source(source)
    assert [(c.cell_type, c.source) for c in stored.cells] == [(c.cell_type, c.source) for c in made.cells]
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert path.stat().st_size < 1_000_000


@pytest.mark.slow
@NOTEBOOK
def test_a_notebook_runs(source, tmp_path, monkeypatch):
    """Runs on a small random model in Hugging Face layout, with two steps of training."""
    text = tmp_path / "text"
    text.mkdir()
    for number, path in enumerate(sorted((ROOT / "lsjax").rglob("*.py"))[:30]):
        (text / f"{number}.py").write_text(path.read_text())
    settings = {"MODEL": RECORDED / "smollm2", "TEXT": text, "STEPS": 3, "WORKDIR": tmp_path / "run"}
    for name, value in settings.items():
        monkeypatch.setenv(f"LSJAX_{name}", str(value))
    notebook = BUILD.run(BUILD.read_source(source), tmp_path / "here", timeout=300)
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "the same tokens: True" in printed
    assert (tmp_path / "run" / "checkpoints" / "3").is_dir()


def test_every_link_to_the_repository_is_the_projects_own():
    """The notebooks install from it, and the badges open them there."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    name = urls["Repository"].removeprefix("https://github.com/")
    for path in (ROOT / "README.md", ROOT / "CITATION.cff", *BUILD.SOURCES):
        found = re.findall(r"github(?:\.com)?/([\w-]*lsjax[\w-]*/[\w-]+)", path.read_text())
        assert found, path
        assert set(found) == {name}, path
