"""The list of smoke tests in conftest.py names tests that exist."""

import re
from pathlib import Path

import pytest

from tests.conftest import SMOKE

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("entry", SMOKE)
def test_an_entry_is_the_beginning_of_a_test(entry):
    file, _, name = entry.partition("::")
    names = re.findall(r"^def (test_\w+)", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert any(test.startswith(name.partition("[")[0]) for test in names)
