"""One run at a time in a folder, on this host and on others; the lock of a host that is gone needs no hand."""

import json
import os
import socket
import threading
import time

import pytest

from fitune.environment import LOCK_HELD
from fitune.errors import UsageError
from fitune.launching import run_lock, signs_of_life
from fitune.launching.run_lock import LOCK, RunLock, is_held_by_launcher


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """A second counts for a minute."""
    for module in (run_lock, signs_of_life):
        monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(run_lock, "LOST_SECONDS", 2)


def left_by_another_host(folder, seconds_ago: float, **fields) -> None:
    """The lock of a host that died: whether the kernel knew of it does not matter, no flock is held."""
    file = folder / LOCK
    file.write_text(json.dumps({"pid": 7, "host": "elsewhere", "alive_within": 2} | fields), encoding="utf-8")
    then = time.time() - seconds_ago
    os.utime(file, (then, then))


def test_a_lock_of_a_host_long_silent_is_taken_at_once(tmp_path, capsys):
    left_by_another_host(tmp_path, seconds_ago=60)
    lock = RunLock(tmp_path)
    assert "process 7 on elsewhere is gone: no sign of life for 60 s" in capsys.readouterr().err
    assert json.loads((tmp_path / LOCK).read_text())["host"] == socket.gethostname()
    lock.release()
    assert (tmp_path / LOCK).read_text() == "" and [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_lock_of_a_host_that_has_just_died_is_waited_for(tmp_path):
    left_by_another_host(tmp_path, seconds_ago=0)
    began = time.monotonic()
    RunLock(tmp_path).release()
    assert time.monotonic() - began > 1.5


def test_a_lock_of_a_host_that_lives_is_never_taken(tmp_path):
    left_by_another_host(tmp_path, seconds_ago=1)
    alive = threading.Timer(0.5, os.utime, [tmp_path / LOCK])
    alive.start()
    with pytest.raises(UsageError, match=r"process 7 on elsewhere trains here; wait for it or stop it"):
        RunLock(tmp_path)
    alive.join()


def test_a_lock_without_signs_of_life_is_left_to_its_owner(tmp_path):
    left_by_another_host(tmp_path, seconds_ago=600, alive_within=None)
    with pytest.raises(UsageError, match="if it is gone, delete"):
        RunLock(tmp_path)


def test_a_holder_shows_that_it_lives(tmp_path):
    lock = RunLock(tmp_path)
    os.utime(tmp_path / LOCK, (1, 1))
    deadline = time.monotonic() + 30
    while (tmp_path / LOCK).stat().st_mtime == 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(UsageError, match=f"process {os.getpid()} on {socket.gethostname()} trains here"):
        RunLock(tmp_path)
    lock.release()


def test_a_holder_that_was_taken_for_dead_ends_before_it_writes(tmp_path, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(run_lock.os, "kill", lambda pid, number: ended.set())
    lock = RunLock(tmp_path)
    left_by_another_host(tmp_path, seconds_ago=0)
    assert ended.wait(30)
    lock._signs.stop()


def test_a_host_of_the_same_name_is_another_one_all_the_same(tmp_path):
    left_by_another_host(tmp_path, seconds_ago=0, host=socket.gethostname())
    began = time.monotonic()
    RunLock(tmp_path).release()
    assert time.monotonic() - began > 1.5


def test_a_dead_process_of_this_host_holds_nothing(tmp_path):
    left_by_another_host(tmp_path, seconds_ago=0, host="renamed", kernel=run_lock._this_kernel())
    began = time.monotonic()
    RunLock(tmp_path).release()
    assert time.monotonic() - began < 1.5


def test_what_is_released_names_nobody(tmp_path):
    """Else another host would go on taking it for held."""
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        assert is_held_by_launcher() and os.environ[LOCK_HELD] == str(os.getpid())
    assert (tmp_path / LOCK).read_text() == ""
    assert not is_held_by_launcher()
