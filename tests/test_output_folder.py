import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import pytest
from patience import PATIENCE_SECONDS

from fitune import output_folder
from fitune.errors import FituneError, UsageError
from fitune.output_folder import check_disk_space, checkpoints, new_folder, rename_when_whole


def _build(output, text="new", **options):
    with new_folder(output, **options) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text(text)


def _gone_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_output_appears_when_it_is_whole(tmp_path):
    output = tmp_path / "deep" / "er" / "out"
    with new_folder(output) as folder:
        (folder / "file").write_text("x")
        assert folder.parent == output.parent
        assert not output.exists()
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    assert (output / "file").read_text() == "x"


def test_all_of_it_is_on_disk_before_the_rename(tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync

    def watched(handle):
        file = Path(f"/proc/self/fd/{handle}").readlink()
        flushed.append((file.name, (tmp_path / "out").exists()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    _build(tmp_path / "out")
    assert {name for name, renamed in flushed if not renamed} > {"file", "sub"}
    assert [name for name, renamed in flushed if renamed] == [tmp_path.name]


@pytest.mark.parametrize(
    "failure", [KeyboardInterrupt(), SystemExit(1), ValueError("bug"), UsageError("yours")], ids=repr
)
@pytest.mark.parametrize("replace", [False, True])
def test_any_failure_leaves_what_was_there(tmp_path, failure, replace):
    if replace:
        _build(tmp_path / "out", "old")
    with pytest.raises(type(failure)), new_folder(tmp_path / "out", replace=replace) as folder:
        (folder / "file").write_text("half")
        raise failure
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * replace
    assert not replace or (tmp_path / "out" / "sub" / "file").read_text() == "old"


def test_a_full_disk_is_one_line(tmp_path):
    with pytest.raises(FituneError) as caught, new_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert type(caught.value) is FituneError
    said = f"{tmp_path}/out: not written: [Errno 28] No space left on device; nothing was left behind"
    assert str(caught.value) == said
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_hold_it_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"file/out: cannot be created: .*; give another output"):
        _build(tmp_path / "file" / "out")


def test_existing_output_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("empty", "file", "link"):
        with pytest.raises(UsageError, match=f"{name}: exists already"), new_folder(tmp_path / name):
            pytest.fail("an hour's work was begun")
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "file", "link"}


def test_what_appears_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(UsageError, match="exists already"), new_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_replace_keeps_the_old_until_the_new_is_whole(tmp_path):
    output = tmp_path / "out"
    _build(output, "old", replace=True)
    with new_folder(output, replace=True) as folder:
        (folder / "file").write_text("new")
        assert (output / "sub" / "file").read_text() == "old"
    assert [path.name for path in output.iterdir()] == ["file"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_replacing_a_link_leaves_its_target_alone(tmp_path):
    _build(tmp_path / "elsewhere", "theirs")
    (tmp_path / "out").symlink_to("elsewhere")
    _build(tmp_path / "out", replace=True)
    assert not (tmp_path / "out").is_symlink()
    assert (tmp_path / "elsewhere" / "sub" / "file").read_text() == "theirs"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "elsewhere"}


def test_a_failed_rename_puts_the_old_back(tmp_path, monkeypatch):
    _build(tmp_path / "out", "old")
    rename = Path.rename

    def failing(self, target):
        if target == tmp_path / "out" and (self / "new").exists():
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(output_folder, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(FituneError, match="Input/output error"), new_folder(tmp_path / "out", replace=True) as folder:
        (folder / "new").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "sub" / "file").read_text() == "old"


def test_rename_when_whole_takes_a_folder_others_have_filled(tmp_path):
    for name in ("partial", "whole"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(UsageError, match="exists already"):
        rename_when_whole(tmp_path / "partial", tmp_path / "whole", replace=False)
    rename_when_whole(tmp_path / "partial", tmp_path / "whole", replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    assert (tmp_path / "whole" / "file").read_text() == "partial"


def _unfinished(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    (folder / name / "file").write_text("half")
    return folder / name


@pytest.mark.parametrize("name", ["out", "o[u]t*"])
def test_what_a_killed_process_left_is_removed_but_not_what_a_running_one_holds(tmp_path, name):
    gone = _gone_process()
    dead = _unfinished(tmp_path, f".{name}.partial-01234567-{gone}")
    reused_number = _unfinished(tmp_path, f".{name}.partial-01234567-{os.getpid()}")
    running = _unfinished(tmp_path, f".{name}.partial-01234567-{os.getppid()}")
    on_another_host = _unfinished(tmp_path, f".{name}.partial-89abcdef-{gone}")
    another_output = _unfinished(tmp_path, f".{name}2.partial-01234567-{gone}")
    lock = os.open(on_another_host, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    _build(tmp_path / name)
    os.close(lock)
    assert not dead.exists() and not reused_number.exists()
    assert {path for path in tmp_path.iterdir()} == {tmp_path / name, running, on_another_host, another_output}


def test_two_threads_may_work_at_once_and_the_first_one_wins(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        thread = threading.Thread(target=_build, args=(tmp_path / "out", "other"))
        thread.start()
        thread.join()
        assert folder.exists()
        (tmp_path / "out").rename(tmp_path / "other")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "other"}


PROGRAM = """
import sys, time
from fitune.output_folder import new_folder
with new_folder(sys.argv[1]) as folder:
    (folder / "file").write_text("half")
    print("at work", flush=True)
    time.sleep(3600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_process_leaves_nothing_that_lasts(tmp_path, number):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    command = [sys.executable, "-c", PROGRAM, tmp_path / "out"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert process.stdout.readline() == b"at work\n"
    process.send_signal(number)
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == {signal.SIGTERM: 128 + signal.SIGTERM}.get(number, -number)
    left = list(tmp_path.iterdir())
    assert len(left) == (1 if number == signal.SIGKILL else 0)
    _build(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_signal_handlers_are_as_before(tmp_path):
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    _build(tmp_path / "one")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    handled = []
    signal.signal(signal.SIGTERM, lambda *_: handled.append(True))
    try:
        with new_folder(tmp_path / "two"):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert handled
    assert (tmp_path / "two").is_dir()


def test_disk_space_is_compared_with_what_the_nearest_existing_folder_has(tmp_path, monkeypatch):
    asked, usage = [], namedtuple("usage", "total used free")(2**31, 2**30, 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: asked.append(folder) or usage)
    check_disk_space(tmp_path / "a" / "b", 2**29)
    with pytest.raises(FituneError, match=r"b: needs 1\.1 GiB, .* has 1\.0 GiB free"):
        check_disk_space(tmp_path / "a" / "b", 2**30)
    assert asked == [tmp_path, tmp_path]


def test_a_folder_that_could_not_be_flushed_is_not_renamed(tmp_path, monkeypatch):
    for name in ("partial", "whole"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)

    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error"):
        rename_when_whole(tmp_path / "partial", tmp_path / "whole", replace=True)
    assert (tmp_path / "whole/file").read_text() == "whole"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_whole_folder_stands_under_its_name_at_every_moment(can_exchange, tmp_path, monkeypatch):
    """Where two names can be exchanged; elsewhere the old one is away for the moment between two renames."""
    for name in ("partial", "whole"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    if not can_exchange:
        monkeypatch.setattr(output_folder, "_exchange", lambda one, other: False)
    renamed = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: renamed.append(self.name) or rename(self, to))
    rename_when_whole(tmp_path / "partial", tmp_path / "whole", replace=True)
    assert renamed == ([] if can_exchange else ["whole", "partial"])
    assert (tmp_path / "whole/file").read_text() == "partial"
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    """Not of their names; what bears another name is none."""
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-100", "checkpoint-x", "damaged-checkpoint-1"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
