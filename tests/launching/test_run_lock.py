"""run.lock: one run at a time in a folder, its holder named."""

import json
import os
import socket

import pytest

from fitune.errors import UsageError
from fitune.launching.run_lock import HELD, LOCK, RunLock, is_held_by_launcher


def test_a_second_run_is_told_who_trains_there(tmp_path):
    lock = RunLock(tmp_path)
    with pytest.raises(UsageError, match=f"process {os.getpid()} on {socket.gethostname()} trains here"):
        RunLock(tmp_path)
    lock.release()
    RunLock(tmp_path).release()


def test_a_lock_of_another_host_is_never_taken(tmp_path):
    """The kernel here cannot tell whether that process is alive."""
    (tmp_path / LOCK).write_text(json.dumps({"pid": 7, "host": "elsewhere"}))
    with pytest.raises(UsageError, match=rf"process 7 on elsewhere may train here.*delete {tmp_path / LOCK}"):
        RunLock(tmp_path)


def test_a_dead_process_of_this_host_holds_nothing(tmp_path):
    (tmp_path / LOCK).write_text(json.dumps({"pid": 7, "host": socket.gethostname()}))
    RunLock(tmp_path).release()


def test_what_is_released_names_nobody(tmp_path):
    """Else another host would go on taking it for held."""
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        assert is_held_by_launcher() and os.environ[HELD] == str(os.getpid())
    assert (tmp_path / LOCK).read_text() == ""
    assert not is_held_by_launcher()
