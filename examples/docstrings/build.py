"""Writes examples for fine-tuning: functions of the standard library, each with the first line of its docstring.

    python examples/docstrings/build.py --output=runs/docstrings

It writes train.jsonl, for data.format="completion", and test.jsonl, for `lsjax evaluate --tasks=docstrings:FILE`. Each
line is {"prompt": FUNCTION, "completion": FIRST LINE}. A tenth of the files gives the tests. The result depends on the
version of Python, whose standard library it is.
"""

import argparse
import json
from pathlib import Path

from lsjax.evaluation.tasks.docstrings import functions_with_docstrings
from lsjax.evaluation.tasks.task import Example
from lsjax.files import write_atomically

TESTS = 0.1  # of the files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for train.jsonl and test.jsonl")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    tests = functions_with_docstrings(TESTS, held_out=True)
    asked = {example.prompt for example in tests}  # the library repeats a few functions
    write(folder / "test.jsonl", tests)
    others = functions_with_docstrings(TESTS, held_out=False)
    write(folder / "train.jsonl", [example for example in others if example.prompt not in asked])


def write(path: Path, examples: list[Example]) -> None:
    rows = ({"prompt": example.prompt, "completion": f" {example.reference}\n"} for example in examples)
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(examples):,} examples in {path}")


if __name__ == "__main__":
    main()
