"""The harness of the malformed inputs: which of them hang."""

import itertools
import time

import pytest

from lsjax.errors import UserError
from tests.fuzz.harness import REFUSED, Case, judge, memory_limit


def judged(call, folder, **limits) -> str:
    """Returns the outcome of an input that needs no parts."""
    return judge(Case("an input", lambda *_: call()), None, folder, str, **limits)


def compute(seconds=float("inf")):
    began = time.process_time()
    for _ in itertools.count():
        if time.process_time() - began > seconds:
            raise UserError("refused at last")


def compute_and_swallow():
    try:
        compute()
    except BaseException as error:
        raise UserError("refused after all") from error


@pytest.mark.parametrize("call", [compute, compute_and_swallow])
def test_an_input_that_computes_for_ever_hangs(call, tmp_path):
    with pytest.raises(AssertionError, match=r"still running after 0\.2 s of processor time"):
        judged(call, tmp_path, processor_limit=0.2)


def test_an_input_that_sleeps_for_ever_hangs(tmp_path):
    with pytest.raises(AssertionError, match=r"still running after 0\.2 s$"):
        judged(lambda: time.sleep(1000), tmp_path, wall_limit=0.2)


def test_an_input_that_waits_for_its_turn_does_not_hang(tmp_path):
    """A process that others keep from running uses no processor time, as one that sleeps."""

    def slow():
        time.sleep(1)
        compute(0.1)

    assert judged(slow, tmp_path, processor_limit=0.8) == REFUSED


def test_the_limit_of_memory_is_beyond_what_the_process_has():
    with memory_limit():
        assert bytearray(1 << 20)
        with pytest.raises(MemoryError):
            bytearray(13 << 30)
