"""Another machine that is gone while ranks run is noticed; one that lives, or has finished, is not."""

import os
import threading
import time

import pytest
from patience import PATIENCE_SECONDS

from fitune.errors import INTERRUPTED
from fitune.launching import other_machines
from fitune.launching.other_machines import MachinesOfAFolder

NAMES = ["first-1", "second-2"]


@pytest.fixture
def machine_1(tmp_path, monkeypatch):
    """What machine 1 shows: `machine_1(text)`; and what machine 0 is told of it by then."""
    monkeypatch.setattr(other_machines, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(other_machines, "FOLLOWS_WITHIN_SECONDS", 0.1)
    (tmp_path / "1.json").write_text('{"name": "second-2", "session": "s"}')
    return tmp_path


def told(folder, seconds: float = PATIENCE_SECONDS):
    """The reason for which ranks are ended, within so long; None for none."""
    reasons, ended = [], threading.Event()
    with MachinesOfAFolder(folder, 0, NAMES, "s", lambda why: (reasons.append(why), ended.set())):
        ended.wait(seconds)
    return reasons[0] if reasons else None


@pytest.mark.parametrize(
    ("name", "content", "said", "code"),
    [
        ("1.failed", '{"name": "second-2", "session": "s"}', "ended with an error, which is printed there", 1),
        ("1.stopped", '{"name": "second-2", "session": "s"}', "was told to stop", INTERRUPTED),
        ("1.json", '{"name": "second-9", "session": "s"}', "was started again", 1),
    ],
)
def test_a_machine_that_ended_is_named_and_the_code_is_its_own(name, content, said, code, machine_1, capsys):
    (machine_1 / name).write_text(content)
    why = told(machine_1)
    assert str(why) == f"machine 1 of 2 {said}; the ranks here were ended" and why.exit_code == code
    assert capsys.readouterr().err.count(f": {why}\n") == 1, "said once, however often ranks are ended"


def test_a_machine_that_shows_no_sign_of_life_is_named(machine_1):
    long_ago = time.time() - other_machines.GONE_SECONDS - 50
    os.utime(machine_1 / "1.json", (long_ago, long_ago))
    assert str(told(machine_1)).startswith("machine 1 of 2 has shown no sign of life for 65")


def test_a_machine_that_lives_or_has_finished_ends_nobody(machine_1):
    (machine_1 / "1.failed").write_text('{"name": "old", "session": "of an earlier start"}')
    assert told(machine_1, 0.5) is None
    (machine_1 / "1.json").unlink()
    assert told(machine_1, 0.5) is None


def test_the_ranks_are_given_time_to_end_by_themselves_first(machine_1, monkeypatch):
    monkeypatch.setattr(other_machines, "FOLLOWS_WITHIN_SECONDS", 3600)
    (machine_1 / "1.failed").write_text('{"name": "second-2", "session": "s"}')
    assert told(machine_1, 0.5) is None
