"""Signals during a run: the first one is kept until the run looks, and one that is ignored stays ignored."""

import os
import signal

import pytest

from lsjax.training.interrupts import Interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_waits_and_the_second_ends_the_run(number):
    with Interrupts() as interrupts:
        interrupts.defer()
        os.kill(os.getpid(), number)
        assert interrupts.requested == number
        with pytest.raises((KeyboardInterrupt, SystemExit)) as ended:
            os.kill(os.getpid(), number)
        assert number == signal.SIGINT or ended.value.code == 128 + number
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def test_a_hang_up_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            interrupts.defer()
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupts.requested is None
    finally:
        signal.signal(signal.SIGHUP, before)
