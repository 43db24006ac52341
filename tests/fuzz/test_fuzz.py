"""Malformed inputs over the Python API, the readers of files, and the commands.

`make test` runs every k-th of them, `make test-fuzz` all. tests/fuzz/harness.py says what a good outcome is.
"""

import pytest

from tests.fuzz.cases import ALL, FEW
from tests.fuzz.harness import judge, memory_limit


@pytest.fixture(scope="module", autouse=True)
def _all_parts(parts):
    parts.make_all()


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        cases = ALL if metafunc.config.getoption("--all-inputs", default=False) else FEW
        metafunc.parametrize("case", cases, ids=[case.name for case in cases])


def test_malformed_input(case, parts, tmp_path, capfd, record_property):
    record_property("outcome", "failed")
    with memory_limit():
        outcome = judge(case, parts, tmp_path, lambda: capfd.readouterr().err)
    record_property("outcome", outcome)


def test_there_are_at_least_500_malformed_inputs():
    assert len({case.name for case in ALL}) == len(ALL) >= 500
    assert len(FEW) >= 30
