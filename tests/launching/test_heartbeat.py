"""The launcher's watch: which rank it takes for the one that hangs. Real hangs are in tests/faults."""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest
import torch
from patience import PATIENCE_SECONDS

from fitune.launching import heartbeat
from fitune.launching.heartbeat import COMPUTED, COUNT, FILES, PATIENCE, PID, GpuProgress, Watch


@pytest.fixture
def ranks(monkeypatch):
    """Numbers of two sleeping processes that are within a step; patience is short."""
    monkeypatch.setattr(heartbeat, "PATIENCE_SECONDS", 0.05)
    processes = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"]) for _ in range(2)]
    numbers = {rank: np.array([process.pid, 0.05, 10, 0, 0, 0]) for rank, process in enumerate(processes)}
    yield numbers
    for process in processes:
        process.kill()
        process.wait()


def judge_twice(watch: Watch, ranks: dict, between=lambda: None) -> str | None:
    assert watch._judge(ranks) is None
    time.sleep(0.1)
    between()
    return watch._judge(ranks)


def wait_for_looks(watch: Watch, count: int) -> None:
    """Until the watch that has started has judged so often; fails when it ends before."""
    judge, looks = watch._judge, threading.Semaphore(0)
    watch._judge = lambda ranks: (looks.release(), judge(ranks))[1]
    for _ in range(count):
        while not looks.acquire(timeout=1):
            assert watch.is_alive()


def test_the_rank_with_the_fewest_layers_hangs_the_others_wait_for_it(ranks, tmp_path):
    ranks[1][COUNT] = 7
    verdict = judge_twice(Watch(tmp_path), ranks)
    assert verdict.startswith(f"rank 1 (pid {ranks[1][PID]:.0f} on ") and "rank 0" not in verdict


def test_the_rank_that_hangs_is_named_though_it_moved_last(ranks, tmp_path):
    def move_once_more():
        ranks[1][COUNT] = 8

    ranks[1][COUNT] = 7
    watch = Watch(tmp_path)
    assert judge_twice(watch, ranks, move_once_more) is None, "it may get on yet"
    time.sleep(0.1)
    verdict = watch._judge(ranks)
    assert verdict.startswith(f"rank 1 (pid {ranks[1][PID]:.0f} on ") and "rank 0" not in verdict


def test_bytes_that_move_are_progress_only_where_files_are_used(ranks, tmp_path, monkeypatch):
    """And keep the others waiting, whose patience is spent."""
    moved = iter(range(100))
    monkeypatch.setattr(heartbeat, "_bytes_moved", lambda pid: next(moved) if pid == ranks[1][PID] else 0)
    watch = Watch(tmp_path)
    ranks[1][FILES] = 1
    assert judge_twice(watch, ranks) is None
    ranks[1][FILES] = 0
    assert judge_twice(watch, ranks) is not None


def test_bytes_moved_are_seen(tmp_path):
    """Of another process, written or read through a file."""
    pause = "print(flush=True); input()"
    script = f"import sys; {pause}; open(sys.argv[1], 'wb').write(bytes(2**20)); {pause}"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path / "file"], **pipes)
    process.stdout.readline()
    before = heartbeat._bytes_moved(process.pid)
    process.stdin.write("\n")
    process.stdin.flush()
    process.stdout.readline()
    assert 2**20 <= heartbeat._bytes_moved(process.pid) - before < 2**21
    process.communicate("\n")
    assert heartbeat._bytes_moved(process.pid) == 0, "and none of a process that is gone"


def test_waiting_for_the_disk_is_seen(tmp_path):
    """By uninterruptible sleep, in which a parent is while its vfork has yet to open a file: here a pipe."""
    os.mkfifo(tmp_path / "pipe")
    opens = "[(os.POSIX_SPAWN_OPEN, 0, sys.argv[1], os.O_RDONLY, 0)]"
    script = f"import os, sys; os.posix_spawn('/bin/true', ['true'], {{}}, file_actions={opens})"
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path / "pipe"])
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not heartbeat._waits_for_disk(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (tmp_path / "pipe").write_text("")
    process.wait(PATIENCE_SECONDS)
    assert not heartbeat._waits_for_disk(process.pid)
    assert not heartbeat._waits_for_disk(os.getpid())


def test_a_layer_counts_when_the_gpu_has_computed_it(monkeypatch):
    """Not when Python has queued it: then a GPU that computes for a minute would be taken for one that hangs."""

    class Event:
        computed = False

        def record(self):
            pass

        def query(self):
            return self.computed

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    rank = heartbeat.Heartbeat()
    progress = GpuProgress(rank.count_computed)
    for _ in range(3):
        progress.count_when_computed()
    progress.count_computed()
    assert rank.numbers[COMPUTED] == 0
    progress.queued[0].computed = progress.queued[2].computed = True
    progress.count_computed()
    assert rank.numbers[COMPUTED] == 1, "work ends in the order in which it was queued"
    progress.queued[0].computed = True
    progress.count_computed()
    assert rank.numbers[COMPUTED] == 3 and not progress.queued


def test_nobody_is_singled_out_without_a_reason(ranks, tmp_path):
    verdict = judge_twice(Watch(tmp_path), ranks)
    assert f"rank 0 (pid {ranks[0][PID]:.0f}" in verdict and f", 1 (pid {ranks[1][PID]:.0f}" in verdict


def test_progress_and_rest_are_no_hang(ranks, tmp_path):
    def advance():
        for numbers in ranks.values():
            numbers[COUNT] += 1

    assert judge_twice(Watch(tmp_path), ranks, advance) is None
    for numbers in ranks.values():
        numbers[PATIENCE] = 0
    assert judge_twice(Watch(tmp_path), ranks) is None


def test_each_rank_has_the_patience_it_asked_for(ranks, tmp_path):
    """The one in its first step may take longer, the one that rests as long as it likes; neither is named."""
    ranks[0][PATIENCE], ranks[1][PATIENCE] = 60, 0
    assert judge_twice(Watch(tmp_path), ranks) is None
    ranks[0][PATIENCE], ranks[0][COUNT] = 0.05, 7
    assert judge_twice(Watch(tmp_path), ranks).startswith("rank 0 (")
    ranks[1][PATIENCE] = 60  # it is slow with what may take long, the other waits for it
    assert judge_twice(Watch(tmp_path), ranks) is None


def test_a_stopped_process_is_noticed_even_at_rest(ranks, tmp_path):
    ranks[0][PATIENCE] = ranks[1][PATIENCE] = 0
    process = psutil.Process(int(ranks[1][PID]))
    process.suspend()
    while process.status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    assert judge_twice(Watch(tmp_path), ranks).startswith("rank 1 (")


def test_a_process_that_has_just_been_stopped_may_be_continued(ranks, tmp_path):
    """Though another has waited for longer than its patience: it may have begun to before."""
    watch = Watch(tmp_path)
    assert watch._judge(ranks) is None
    time.sleep(0.1)
    process = psutil.Process(int(ranks[1][PID]))
    process.suspend()
    while process.status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    assert watch._judge(ranks) is None


def test_with_several_machines_the_verdict_is_about_this_one(ranks, tmp_path):
    verdict = judge_twice(Watch(tmp_path, machines=2), ranks)
    assert "no progress for 0 s, here or on a machine it waits for; all ranks were ended" in verdict


def test_a_launcher_that_was_suspended_begins_to_watch_again(ranks, tmp_path, monkeypatch):
    for rank, numbers in ranks.items():
        numbers.tofile(tmp_path / str(rank))
    monkeypatch.setattr(heartbeat, "PAUSE_SECONDS", 0)  # each look comes after such a pause
    watch = Watch(tmp_path)
    watch.start()
    wait_for_looks(watch, 3)
    watch.stop()
    assert not watch.ended


def test_a_rank_that_has_only_made_its_file_is_no_process(tmp_path):
    """Its pid would be 0: the launcher and all that belongs to it."""
    np.zeros(len(heartbeat.NUMBERS)).tofile(tmp_path / "0")
    np.array([]).tofile(tmp_path / "1")
    watch = Watch(tmp_path)
    watch.start()
    wait_for_looks(watch, 2)
    watch.stop()
    assert not watch.ended


def test_all_ranks_are_killed_and_the_verdict_is_printed(ranks, tmp_path, capsys):
    for rank, numbers in ranks.items():
        numbers.tofile(tmp_path / str(rank))
    watch = Watch(tmp_path)
    watch.start()
    watch.join(PATIENCE_SECONDS)
    assert not watch.is_alive()
    assert "no progress for 0 s; all ranks were ended" in capsys.readouterr().err
    for numbers in ranks.values():
        assert psutil.Process(int(numbers[PID])).wait(PATIENCE_SECONDS) == -9


def test_a_rank_asks_for_patience_by_what_it_does():
    rank = heartbeat.Heartbeat()
    asked = []
    events = ("step_begin", "pre_optimizer_step", "step_end")
    for event in (*events, *events):
        getattr(rank, f"on_{event}")(None, None, None)
        asked.append(rank.numbers[PATIENCE])
    long, short = heartbeat.STARTING_SECONDS, heartbeat.PATIENCE_SECONDS
    assert asked == [long, long, 0, short, long, 0]
    first_evaluation = rank.evaluating, long  # compiles, as the first step does
    for context, patience in (
        (rank.starting, long), first_evaluation, (rank.evaluating, short), (rank.using_files, short),
    ):  # fmt: skip
        with context():
            assert rank.numbers[PATIENCE] == patience
            assert rank.numbers[FILES] == (context == rank.using_files)
            counted = rank.numbers[COUNT]
            with rank.waiting():
                assert rank.numbers[PATIENCE] == 0 and rank.numbers[COUNT] == counted + 1
            assert rank.numbers[PATIENCE] == patience
        assert rank.numbers[PATIENCE] == rank.numbers[FILES] == 0


def test_ranks_that_did_the_same_in_a_step_count_the_same_whatever_they_did_before():
    """Rank 0 alone makes tokens and writes what all wait for; else another rank would be blamed for its hang."""
    ranks = heartbeat.Heartbeat(), heartbeat.Heartbeat()
    for rank in ranks:
        rank.count_layers([])
    with ranks[0].using_files():
        ranks[0].count()
    for number, rank in enumerate(ranks):
        rank.on_train_begin(None, None, None)
        with rank.using_files():
            for _ in range(3 * number):
                rank.count()
        before = rank.numbers[COUNT]
        rank.on_step_begin(None, None, None)
        assert rank.numbers[COUNT] > before
    assert ranks[0].numbers[COUNT] == ranks[1].numbers[COUNT]


def test_the_launcher_knows_whether_ranks_have_begun_to_train(tmp_path, monkeypatch):
    monkeypatch.setenv(heartbeat.HEARTBEATS, str(tmp_path))
    watch = Watch(tmp_path)
    assert not watch.has_begun_to_train()
    rank = heartbeat.Heartbeat()
    assert not watch.has_begun_to_train()
    rank.on_train_begin(None, None, None)
    assert watch.has_begun_to_train()


def test_a_rank_whose_weights_are_loaded_is_ahead_of_one_that_reads():
    rank = heartbeat.Heartbeat()
    for _ in range(1000):
        rank.count()
    done = heartbeat.Heartbeat()
    layer = torch.nn.Identity()
    done.count_layers([layer])
    assert done.numbers[COUNT] > rank.numbers[COUNT]
    layer(torch.zeros(1))
    assert done.numbers[COUNT] == heartbeat.READS_AT_MOST + 2
    layer(torch.zeros(1, requires_grad=True) * 2).backward()
    assert done.numbers[COUNT] == heartbeat.READS_AT_MOST + 5, "and the backward pass, which may take a minute"
