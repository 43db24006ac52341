"""Signals during a run: the first waits until the run looks, an ignored one stays ignored, and none gets lost."""

import gc
import signal
import sys
import time

import pytest

from lsjax.training.interrupts import Interrupts


def signal_twice(number):
    with Interrupts() as interrupts:
        interrupts.defer()
        signal.raise_signal(number)  # to this thread, so at once
        assert interrupts.requested == number
        signal.raise_signal(number)
        pytest.fail("the second signal did not end the run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_waits_and_the_second_ends_the_run(number):
    before = signal.getsignal(number)
    with pytest.raises((KeyboardInterrupt, SystemExit)) as ended:
        signal_twice(number)
    check_status(ended, number)
    assert signal.getsignal(number) == before


def test_a_hang_up_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            interrupts.defer()
            signal.raise_signal(signal.SIGHUP)
            assert interrupts.requested is None
    finally:
        signal.signal(signal.SIGHUP, before)


SIGNALS = pytest.mark.parametrize(
    ("number", "ending"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit), (signal.SIGHUP, SystemExit)],
    ids=["SIGINT", "SIGTERM", "SIGHUP"],
)


def check_status(caught, number):
    assert number == signal.SIGINT or caught.value.code == 128 + number


@SIGNALS
def test_a_signal_ends_the_start_of_a_run(number, ending):
    before = signal.getsignal(number)
    with pytest.raises(ending) as caught, Interrupts():
        signal.raise_signal(number)
    check_status(caught, number)
    assert signal.getsignal(number) == before


def signal_while_collecting(number):
    signalled = []

    def callback(phase, info):
        if phase == "stop" and not signalled:
            signalled.append(number)
            signal.raise_signal(number)

    gc.callbacks.append(callback)
    try:
        with Interrupts():
            gc.collect()
            assert signalled, "the collector does not call back"
            time.sleep(5)
            pytest.fail("the signal is lost")
    finally:
        gc.callbacks.remove(callback)


@SIGNALS
def test_a_signal_in_a_callback_of_the_garbage_collector_ends_the_run(number, ending, capfd):
    """Python drops what a callback raises."""
    with pytest.raises(ending) as caught:
        signal_while_collecting(number)
    check_status(caught, number)
    assert capfd.readouterr().err == ""


def signal_caught_by_a_library(number, then):
    """Does what a library does that catches everything, and ends its work with the function `then`."""
    with Interrupts() as interrupts:
        try:
            signal.raise_signal(number)
        except BaseException:
            then(interrupts)


def fail_otherwise(interrupts):
    raise ImportError("cannot import the name x") from None


def begin(interrupts):
    interrupts.defer()
    pytest.fail("the signal is lost")


@SIGNALS
@pytest.mark.parametrize("then", [begin, fail_otherwise, lambda interrupts: None], ids=["defer", "error", "end"])
def test_a_signal_that_a_library_catches_is_raised_again(number, ending, then):
    with pytest.raises(ending) as caught:
        signal_caught_by_a_library(number, then)
    check_status(caught, number)


def test_other_dropped_exceptions_are_reported_as_ever(capfd):
    class Careless:
        def __del__(self):
            raise ValueError("in a finalizer")

    hook = sys.unraisablehook
    sys.unraisablehook = sys.__unraisablehook__
    try:
        with Interrupts():
            del (careless := [Careless()])[0]
            assert not careless
        assert sys.unraisablehook == sys.__unraisablehook__
    finally:
        sys.unraisablehook = hook
    assert "ValueError: in a finalizer" in capfd.readouterr().err
