"""`import lsjax` is quick and quiet, and every public name is there."""

import subprocess
import sys

import pytest

import lsjax


def test_importing_the_package_imports_no_heavy_library_and_prints_nothing():
    program = "import sys, lsjax; sys.exit(bool({'jax', 'numpy', 'orbax', 'matplotlib'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize("name", lsjax.__all__)
def test_a_public_name_is_there(name):
    assert getattr(lsjax, name) is not None
    assert name in dir(lsjax)


def test_every_public_name_is_listed_for_type_checkers_and_for_loading():
    assert sorted({*lsjax._MODULE_OF, "__version__"}) == sorted(lsjax.__all__)


def test_another_name_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        lsjax.generat  # noqa: B018
