"""What a signal does to a launcher that has no ranks: before they are started, and when they have ended."""

import os
import signal

import pytest

from fitune.launching.signals import PASSED_ON, passed_on_to_ranks

NOBODY_RUNS = "fitune.no_such_module"


@pytest.mark.parametrize("number", PASSED_ON)
def test_before_there_are_ranks_it_ends_the_launcher(number):
    with pytest.raises(KeyboardInterrupt), passed_on_to_ranks(NOBODY_RUNS):
        os.kill(os.getpid(), number)
        signal.pause()


@pytest.mark.parametrize("number", PASSED_ON)
def test_when_ranks_that_trained_have_ended_it_is_noted(number):
    with passed_on_to_ranks(NOBODY_RUNS, lambda: True) as received:
        os.kill(os.getpid(), number)
        assert received == [number]
