"""The program `lsjax`: its commands are the modules of lsjax.cli, and help needs no JAX."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from lsjax.cli.main import COMMANDS, main

ROOT = Path(__file__).parent.parent.parent


def test_every_command_is_a_module_and_a_script_and_no_module_is_left_out():
    modules = {
        path.stem
        for path in (ROOT / "lsjax" / "cli").glob("*.py")
        if any(isinstance(n, ast.FunctionDef) and n.name == "define_flags" for n in ast.parse(path.read_text()).body)
    }
    assert modules == set(COMMANDS)
    assert {path.stem for path in (ROOT / "launch").glob("*.py")} == set(COMMANDS)


def test_help_is_one_screen_that_lists_every_command(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 80
    assert {line.split()[0] for line in lines if line.startswith("  ")} >= set(COMMANDS)


@pytest.mark.parametrize("arguments", [["--help"], ["decode", "--help"], ["train", "--config=nope"]])
def test_help_and_wrong_flags_do_not_wait_for_jax(arguments):
    program = (
        "import sys; from lsjax.cli.main import main\n"
        f"main({arguments!r})\n"
        "sys.exit(bool({'jax', 'numpy', 'orbax'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_the_version_is_the_packages(capsys):
    import lsjax

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lsjax {lsjax.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "lsjax: unknown command 'trian'; did you mean train?\n"),
        (["sing"], "lsjax: unknown command 'sing'; see lsjax --help\n"),
        (["--model=x"], "lsjax: unknown flag --model=x: a command comes first (see lsjax --help)\n"),
    ],
)
def test_an_unknown_command_is_one_line(capsys, arguments, message):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", message)


def test_a_command_may_be_written_with_dashes(capsys):
    assert main(["compile-ahead", "--topology=tpu:v9:4x4", "--config=scratch"]) == 2
    assert capsys.readouterr().err.startswith("lsjax compile_ahead: ")


def test_the_package_runs_as_a_module():
    run = subprocess.run([sys.executable, "-m", "lsjax", "trian"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (2, "lsjax: unknown command 'trian'; did you mean train?\n")
