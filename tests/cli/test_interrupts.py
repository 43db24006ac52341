"""Ctrl-C and SIGTERM while a command starts: status 130 or 143, at most one line, and no traceback."""

import signal
import subprocess
import sys

import pytest

from lsjax.cli.main import COMMANDS

# Sends a signal to this process when a module is first looked for; a job in the background of a script ignores SIGINT.
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            signal.raise_signal({number:d})

sys.meta_path.insert(0, Finder())
sys.argv = [{name!r} + ".py", *{arguments!r}]
from lsjax.cli.main import launch
launch({name!r})
"""


def check(name, arguments, module, number):
    program = PROGRAM.format(name=name, arguments=arguments, module=module, number=number)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 128 + number, run.stderr
    assert run.stderr in ("", f"{name}.py: interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_in_the_first_imports_of_a_command(name, number):
    check(name, [], "absl.flags", number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("module", ["ml_collections", "jax", "orbax.checkpoint", "lsjax.training.step"])
def test_a_signal_in_a_later_import_of_a_command(module, number, tmp_path):
    check("train", ["--config=demo", f"--workdir={tmp_path}/run"], module, number)
    assert not (tmp_path / "run").exists()
