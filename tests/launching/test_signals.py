"""What a signal does to a launcher that has no ranks: before they are started, and when they have ended."""

import os
import signal

import pytest

from fitune.launching.signals import PASSED_ON, ignored, passed_on_to_ranks

NOBODY_RUNS = "fitune.no_such_module"


@pytest.fixture(params=PASSED_ON)
def number(request):
    """Not ignored, as it may be where the tests run."""
    before = signal.signal(request.param, signal.SIG_DFL)
    yield request.param
    signal.signal(request.param, before)


def test_before_there_are_ranks_it_ends_the_launcher(number):
    with pytest.raises(KeyboardInterrupt), passed_on_to_ranks(NOBODY_RUNS):
        os.kill(os.getpid(), number)


def test_when_ranks_that_trained_have_ended_it_is_noted(number):
    with passed_on_to_ranks(NOBODY_RUNS, lambda: True) as received:
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            pytest.fail("it ends the launcher")
    assert received == [number]


def test_what_is_ignored_stays_so(number):
    signal.signal(number, signal.SIG_IGN)
    with passed_on_to_ranks(NOBODY_RUNS) as received:
        os.kill(os.getpid(), number)
        assert not received


def test_a_result_is_told_whatever_signal_comes(number):
    with ignored():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) == signal.SIG_DFL
