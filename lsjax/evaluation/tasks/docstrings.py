"""Summaries of Python functions: from a function of the standard library to the first line of its docstring."""

import ast
import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from lsjax.config import DataConfig
from lsjax.data.corpus import Skipped, list_corpus
from lsjax.data.documents import Document, digest_of, is_held_out, read_documents
from lsjax.data.jsonl import read_jsonl, text_of
from lsjax.errors import UserError
from lsjax.evaluation.scores import rouge
from lsjax.evaluation.tasks.task import Example

_WORDS = range(4, 21)  # of the first line: shorter ones say nothing, longer ones are no summary
_LINES = range(4, 41)  # of the function, without its docstring
_ASK = "\n\n# What the function above does, in one line:\n#"


@dataclasses.dataclass(frozen=True)
class Docstrings:
    """Functions of the running interpreter's standard library; needs no download.

    Without a path they are those of the files that lsjax holds out by default, so a model trained on
    config.data.corpus "python" has not seen them. Which functions these are depends on the version of Python.

    path: a file of examples/docstrings/build.py, {"prompt": TEXT, "completion": TEXT} per line.
    """

    path: Path | None = None
    metrics: tuple[str, ...] = ("rougeL", "rouge1", "rouge2")
    stop: tuple[str, ...] = ("\n",)
    max_new_tokens: int = 48

    def examples(self) -> list[Example]:
        """Returns the functions, each with its docstring's first line as reference: by file and line, or as in path."""
        if self.path is None:
            return functions_with_docstrings(DataConfig().held_out_fraction, held_out=True)
        examples = []
        for number, row in read_jsonl(self.path):
            place = f"{self.path}:{number}"
            reference = text_of(row, "completion", place).strip()
            examples.append(Example(str(number), text_of(row, "prompt", place), reference))
        if not examples:
            raise UserError(f'{self.path} holds no examples: put one {{"prompt": TEXT, "completion": TEXT}} per line')
        return examples

    def score(self, example: Example, text: str) -> dict[str, float]:
        """Returns ROUGE-1, ROUGE-2 and ROUGE-L."""
        return rouge(text, example.reference)


def functions_with_docstrings(fraction: float, held_out: bool) -> list[Example]:
    """Returns functions of the standard library that have a docstring of one useful line, by file and line.

    held_out: take the files that are held out when that fraction of them is; otherwise all others, to train on.
    """
    found = []
    for document in _modules(fraction, held_out):
        file = document.place.piece.name
        for node in ast.walk(ast.parse(document.text)):
            if isinstance(node, ast.FunctionDef) and (example := make_example(file, node)):
                found.append((file, node.lineno, example))
    return [example for *_, example in sorted(found)]


def _modules(fraction: float, held_out: bool) -> Iterator[Document]:
    data = DataConfig(corpus="python")
    for unit in list_corpus(data).units():
        for document in read_documents(unit.pieces, data, Skipped()):
            if is_held_out(digest_of(document.content()), fraction) == held_out:
                yield document


def make_example(file: str, function: ast.FunctionDef) -> Example | None:
    """Returns the example of a function, or None where it has no docstring or one of the wrong size.

    The prompt is the function as `ast.unparse` writes it, without comments and docstring.
    """
    docstring = ast.get_docstring(function)
    if not docstring or len(function.body) < 2:
        return None
    first_line = docstring.splitlines()[0].strip()
    undocumented = copy.copy(function)
    undocumented.body = function.body[1:]
    bare = ast.unparse(undocumented)
    if len(first_line.split()) not in _WORDS or bare.count("\n") + 1 not in _LINES:
        return None
    return Example(f"{file}:{function.lineno}:{function.name}", bare + _ASK, first_line)
