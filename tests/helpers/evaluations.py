"""Runs `lsjax evaluate` in process on a small recorded model, and finds rows of its reports."""

import contextlib
import io
from pathlib import Path

from lsjax.cli.main import main

MODEL = Path(__file__).parent.parent / "io" / "recorded" / "llama32"
PROMPTS = ["the cat", "a", "on the mat there sat", "it is"]
NEW_TOKENS = 12


def run_evaluate(*arguments, status=0):
    """Returns (standard output, standard error) of `lsjax evaluate`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["evaluate", f"--model={MODEL}", f"--max_new_tokens={NEW_TOKENS}", *map(str, arguments)])
    assert code == status, err.getvalue()
    return out.getvalue(), err.getvalue()


def row_of(report, task, strategy):
    """Returns the row of a task and a strategy, both by name."""
    (row,) = [row for row in report["rows"] if (row["task"], row["strategy"]) == (task, strategy)]
    return row
