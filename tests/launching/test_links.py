"""Machines that evaluate together: one that is gone while ranks run is noticed on the connection to it."""

import signal
import socket
import threading

import pytest
from patience import PATIENCE_SECONDS

from fitune.errors import ENDED_BY_A_SIGNAL, INTERRUPTED, FituneError, Interrupted
from fitune.launching import other_machines
from fitune.launching.links import Links


@pytest.fixture
def ends(monkeypatch):
    """Both ends of the connection between machine 0 and machine 1."""
    monkeypatch.setattr(other_machines, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(other_machines, "FOLLOWS_WITHIN_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as second:
        yield server.accept()[0], second


def told(links: Links, end_of_the_other, seconds: float = PATIENCE_SECONDS) -> FituneError | None:
    """The reason for which ranks are ended within so long, while the other machine does what it does."""
    reasons, ended = [], threading.Event()
    with links, links.beside(lambda why: (reasons.append(why), ended.set())):
        end_of_the_other()
        ended.wait(seconds)
    return reasons[0] if reasons else None


def machine_1(connection: socket.socket, code: int | BaseException):
    """It ends with this exit code, or raises this."""

    def end() -> None:
        try:
            with Links({0: connection}, 2) as links:
                if isinstance(code, BaseException):
                    raise code
                links.ended_with(code)
        except BaseException as error:
            assert error is code

    return end


@pytest.mark.parametrize(
    ("code", "said", "exit_code"),
    [
        (1, "ended with an error, which is printed there", 1),
        (FituneError("no"), "ended with an error, which is printed there", 1),
        (ENDED_BY_A_SIGNAL + signal.SIGTERM, "was told to stop", INTERRUPTED),
        (KeyboardInterrupt(), "was told to stop", INTERRUPTED),
        (Interrupted("no"), "was told to stop", INTERRUPTED),
    ],
)
def test_a_machine_says_how_it_ended(code, said, exit_code, ends):
    why = told(Links({1: ends[0]}, 2), machine_1(ends[1], code))
    assert str(why) == f"machine 1 of 2 {said}; the ranks here were ended" and why.exit_code == exit_code


def test_a_machine_that_ends_without_a_word_is_gone(ends):
    assert str(told(Links({1: ends[0]}, 2), ends[1].close)).startswith("machine 1 of 2 is gone; ")


def test_machine_0_that_ends_is_noticed_by_the_others(ends):
    assert str(told(Links({0: ends[1]}, 2), ends[0].close)).startswith("machine 0 of 2 is gone; ")


@pytest.mark.parametrize("has_finished", [False, True])
def test_a_machine_that_lives_or_has_finished_ends_nobody(has_finished, ends):
    assert told(Links({1: ends[0]}, 2), machine_1(ends[1], 0) if has_finished else lambda: None, 0.5) is None


def test_the_system_gives_up_a_machine_whose_power_was_cut_as_late_as_one_that_trains(ends):
    with Links({1: ends[0]}, 2):
        assert ends[0].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        idle, each, count = (ends[0].getsockopt(socket.IPPROTO_TCP, option) for option in options)
        assert idle + each * count == other_machines.GONE_SECONDS


def test_ranks_that_end_by_themselves_are_given_time(ends, monkeypatch):
    monkeypatch.setattr(other_machines, "FOLLOWS_WITHIN_SECONDS", 3600)
    assert told(Links({1: ends[0]}, 2), ends[1].close, 0.5) is None
