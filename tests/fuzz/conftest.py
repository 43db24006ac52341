"""All malformed inputs with --all-inputs, else every k-th; their parts, made once; and a line that counts outcomes."""

import collections

import pytest

from tests.fuzz.parts import Parts


def pytest_addoption(parser):
    parser.addoption("--all-inputs", action="store_true", help="All malformed inputs and kills, not only a few.")


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> Parts:
    return Parts(tmp_path_factory.mktemp("parts"))


def pytest_terminal_summary(terminalreporter):
    counts: collections.Counter = collections.Counter()
    for kind in ("passed", "failed"):
        for report in terminalreporter.stats.get(kind, ()):
            if getattr(report, "when", "") == "call" and "test_malformed_input" in report.nodeid:
                counts[dict(report.user_properties).get("outcome", "failed")] += 1
    if counts:
        text = ", ".join(f"{counts[name]} {name}" for name in ("refused", "valid", "failed"))
        terminalreporter.write_line(f"{sum(counts.values())} malformed inputs: {text}")
