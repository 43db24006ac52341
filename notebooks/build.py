"""Runs the notebooks and writes them, with their outputs, as .ipynb files beside their sources.

  make notebooks

The sources are the .py files (jupytext, percent format). LSJAX_MODEL, LSJAX_TEXT, LSJAX_STEPS and LSJAX_WORKDIR change
what they run on.
"""

import argparse
import sys
from pathlib import Path

import jupytext
import nbclient
import nbformat

FOLDER = Path(__file__).parent
SOURCES = sorted(path for path in FOLDER.glob("*.py") if path.name != Path(__file__).name)


def read_source(path: Path) -> nbformat.NotebookNode:
    """Returns a source file as a notebook without outputs. Cells are numbered, so that two builds have equal ids."""
    notebook = jupytext.read(path)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    notebook.metadata.pop("jupytext", None)
    return notebook


def run(notebook: nbformat.NotebookNode, folder: Path, timeout: int) -> nbformat.NotebookNode:
    """Runs a notebook in `folder`, with outputs filled in. timeout: seconds per cell."""
    folder.mkdir(parents=True, exist_ok=True)
    client = nbclient.NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(folder)}})
    client.execute()
    for cell in notebook.cells:  # what libraries say on standard error is about this machine, not about the notebook
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks to run; all when none is given")
    parser.add_argument("--folder", type=Path, default=Path("runs/notebooks"), help="where they run")
    arguments = parser.parse_args()
    for path in SOURCES:
        if not arguments.names or path.stem in arguments.names:
            print(f"running {path.name}", file=sys.stderr, flush=True)
            notebook = run(read_source(path), arguments.folder / path.stem, timeout=3600)
            nbformat.write(notebook, path.with_suffix(".ipynb"))


if __name__ == "__main__":
    main()
