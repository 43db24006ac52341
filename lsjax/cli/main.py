"""The program `lsjax`: lists its commands, and runs one of them."""

import difflib
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence

from lsjax.cli.ending import BAD_INPUT, run_to_the_end, say

# One line for each module of this package that is a command; --help prints them without importing anything.
GROUPS = {
    "Use a model": {
        "generate": "continue prompts: stream one text, or a file of results",
        "decode": "benchmark the decoding strategies of a model",
        "tune": "find the fastest setting by temperature and batch size",
        "explain": "show what each layer predicts, token by token",
        "evaluate": "measure quality beside speed, task by task",
        "draft_vocabulary": "list a model's frequent tokens, for cheaper drafts",
        "convert": "write a model for transformers, lsjax or llama.cpp",
    },
    "Train a model": {
        "train": "train or continue a Llama with LayerSkip",
        "prepare": "tokenize and pack a large corpus before training",
        "compile_ahead": "compile a run for TPUs or GPUs that are not there",
        "ablate": "train a grid of LayerSkip recipes and compare them",
    },
    "See it work": {
        "demo": "a small model before and after LayerSkip, and its speed",
        "demo_pretrained": "continue SmolLM2-135M; every exit before and after",
    },
    "Measure": {
        "benchmark_training": "time the training step of a configuration",
        "benchmark_kernels": "time the KV cache's kernels on this accelerator",
    },
}
COMMANDS = [name for group in GROUPS.values() for name in group]

_USAGE = """\
lsjax: LayerSkip in JAX. Trains a Llama whose early layers can already predict,
then decodes faster with it (arXiv 2404.16710).

  lsjax train --config=demo --workdir=runs/demo
  lsjax generate --model=runs/demo --prompt="def main():"
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `lsjax ARGUMENTS` and returns the exit status. arguments: those of the process by default."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    return run_to_the_end("lsjax", lambda: _run(given))


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-help", "-h", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(f"lsjax {importlib.metadata.version('lsjax')}")
        return 0
    name = arguments[0].replace("-", "_")
    if name not in COMMANDS:
        say("lsjax", _unknown(arguments[0]))
        return BAD_INPUT
    return run_command(name, arguments[1:], program=f"lsjax {name}", call=f"lsjax {name}")


def launch(name: str) -> None:
    """Runs a command as the script launch/NAME.py, and exits with its status."""
    call, program = f"python launch/{name}.py", os.path.basename(sys.argv[0])
    sys.exit(run_to_the_end(program, lambda: run_command(name, sys.argv[1:], program, call)))


def run_command(name: str, arguments: Sequence[str], program: str, call: str) -> int:
    """Runs the command of module lsjax.cli.NAME and returns its exit status.

    program: the name before its error messages. call: how it was called, for its --help.
    """
    from lsjax.cli import command

    module = importlib.import_module(f"lsjax.cli.{name}")
    text = module.__doc__ or ""
    return command.run(command.Command(name, text, module.define_flags, module.main), arguments, program, call)


def usage() -> str:
    """Returns the text of `lsjax --help`, one screen."""
    lines = [_USAGE]
    for title, commands in GROUPS.items():
        lines += [title, *(f"  {name:20}{text}" for name, text in commands.items()), ""]
    return "\n".join([*lines, "lsjax COMMAND --help explains a command and its flags; lsjax --version."])


def _unknown(name: str) -> str:
    if name.startswith("-"):
        return f"unknown flag {name}: a command comes first (see lsjax --help)"
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    return f"unknown command {name!r}; " + (f"did you mean {close[0]}?" if close else "see lsjax --help")
