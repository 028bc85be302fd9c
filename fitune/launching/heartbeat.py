"""Each rank counts what it has done where the launcher can see it, so that a rank that hangs is found by name.

While a rank hangs, the others wait for it inside a collective and look as stuck as it does; the one that hangs has
counted the least: ranks count what they do in step, layers and collectives. A rank says how long it may take until it
counts again: five minutes while it joins the others, in the first step and the first evaluation, which compile, and in
the optimizer's; less while layers are computed, forward and backward, and files read or written; as long as it needs
while it downloads, prepares rows, or has nothing to do but wait for the others. A rank that reads or writes files gets
on as long as bytes move. A stopped process is noticed at any time. A launcher sees the ranks of its own machine.
"""

import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import torch
from transformers import TrainerCallback

from fitune.environment import HEARTBEATS, HUNG_AFTER, number
from fitune.errors import FituneError, say_while_training

PATIENCE_SECONDS = number(HUNG_AFTER, 45)
STARTING_SECONDS = max(300, PATIENCE_SECONDS)
READS_AT_MOST = 1e9
COUNTS_AT_MOST = 1e6
"Of one step, evaluation or save."
PAUSE_SECONDS = 5
"A launcher that slept so long between two looks was suspended, and its ranks with it."
PID, PATIENCE, COUNT, COMPUTED, FILES, TRAINS = NUMBERS = range(6)


class Heartbeat(TrainerCallback):
    """The counting side: six numbers in a memory-mapped file, no system call per count. Made before anything else.

    A patience of 0 seconds: the rank may rest.
    """

    def __init__(self):
        folder, rank = os.environ.get(HEARTBEATS), os.environ.get("RANK", "0")
        shape = (len(NUMBERS),)
        self.numbers = np.memmap(Path(folder) / rank, np.float64, "w+", shape=shape) if folder else np.zeros(shape)
        self.numbers[PID] = os.getpid()
        self.steps = self.evaluations = self.stages = 0

    def begin(self, patience: float) -> None:
        """Whoever watches may give this rank up when it has not counted for `patience` seconds."""
        self.numbers[PATIENCE] = patience

    def _begin_stage(self, patience: float) -> None:
        """All ranks count on from the same number, whatever each counted before: who has least is behind.

        From training on, since all go through the same stages there; before, rank 0 alone may use files.
        """
        if self.numbers[TRAINS]:
            self.stages += 1
            self.numbers[COUNT] = READS_AT_MOST + self.stages * COUNTS_AT_MOST
        self.begin(patience)

    def rest(self) -> None:
        self.numbers[PATIENCE] = 0

    @contextmanager
    def starting(self):
        """Of what should take seconds, but may wait for the slowest of many ranks."""
        self.begin(STARTING_SECONDS)
        yield
        self.rest()

    @contextmanager
    def using_files(self):
        """While files are read or written: bytes that move are progress, and so is waiting for the disk."""
        self.numbers[FILES] = True
        self._begin_stage(PATIENCE_SECONDS)
        yield
        self.rest()
        self.numbers[FILES] = False

    @contextmanager
    def waiting(self):
        """For the other ranks: they may take as long as they need, or hang, and are watched themselves."""
        self.count()
        patience = self.numbers[PATIENCE]
        self.rest()
        yield
        self.begin(patience)

    def count(self, *_) -> None:
        self.numbers[COUNT] += 1

    def count_computed(self) -> None:
        """A number of its own, for the thread that asks the GPU."""
        self.numbers[COMPUTED] += 1

    def count_layers(self, layers) -> None:
        """From now on; a rank that has come so far is ahead of one that still reads, whatever their shares."""
        self.numbers[COUNT] = READS_AT_MOST
        count = self.count
        if torch.cuda.is_initialized():
            progress = GpuProgress(self.count_computed)
            progress.start()
            count = progress.count_when_computed

        def count_output(layer, inputs, output) -> None:
            count()
            if output.requires_grad:
                output.register_hook(count)  # where its backward begins

        for layer in layers:
            layer.register_forward_pre_hook(count)
            layer.register_forward_hook(count_output)

    def will_save(self, *_, **__) -> None:
        """From now on a signal makes this rank finish and save what it does."""
        self.numbers[TRAINS] = True

    on_train_begin = will_save

    def on_step_begin(self, args, state, control, **kwargs):
        self._begin_stage(PATIENCE_SECONDS if self.steps else STARTING_SECONDS)
        self.steps += 1

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.begin(STARTING_SECONDS)  # no layer computes; offloaded, all parameters of a machine pass through its CPU

    def on_step_end(self, args, state, control, **kwargs):
        self.rest()

    @contextmanager
    def evaluating(self):
        self._begin_stage(PATIENCE_SECONDS if self.evaluations else STARTING_SECONDS)
        self.evaluations += 1
        yield
        self.rest()


class GpuProgress(threading.Thread):
    """Counts layers once the GPU has computed them.

    Python queues the work of many layers ahead, then waits for all of it, on slow machines for minutes. Meanwhile this
    thread asks the GPU.
    """

    def __init__(self, count: Callable[[], None]):
        super().__init__(daemon=True)
        self.count, self.device = count, torch.cuda.current_device()
        self.queued: deque[torch.cuda.Event] = deque()

    def count_when_computed(self, *_) -> None:
        event = torch.cuda.Event()
        event.record()
        self.queued.append(event)

    def run(self) -> None:
        torch.cuda.set_device(self.device)
        with suppress(RuntimeError):  # the GPU failed, as the training thread will hear too
            while True:
                self.count_computed()
                time.sleep(0.5)

    def count_computed(self) -> None:
        while self.queued and self.queued[0].query():
            self.queued.popleft()
            self.count()


class Watch(threading.Thread):
    """The launcher's side: kills all ranks of this machine once one of them hangs, and says which."""

    def __init__(self, folder: Path, machines: int = 1):
        super().__init__(daemon=True)
        self.folder, self.machines = folder, machines
        self.ended: set[int] = set()
        "Processes that were killed, and the reason printed."
        self.reason: FituneError | None = None
        "Why `end_ranks` was called."
        self._over = threading.Event()
        self._seen: dict[int, tuple[tuple, float]] = {}

    def run(self) -> None:
        polled = time.monotonic()
        while not self._over.wait(1):
            if time.monotonic() - polled > PAUSE_SECONDS:
                self._seen.clear()
            polled = time.monotonic()
            ranks = self._ranks()
            if verdict := self._judge(ranks):
                say_while_training(f"error: {verdict}")
                self._end_all()
                return

    def end_ranks(self, reason: FituneError) -> None:
        """Kills all ranks of this machine."""
        self.reason = reason
        self._end_all()

    def stop(self) -> None:
        self._over.set()
        self.join()

    def has_begun_to_train(self) -> bool:
        """Whether a rank is beyond its preparations, so that a signal makes it finish and save a step."""
        return any(numbers[TRAINS] for numbers in self._ranks().values())

    def _ranks(self) -> dict[int, np.ndarray]:
        """What each rank has counted, by rank; without those that are about to begin."""
        files = [file for file in self.folder.iterdir() if file.name.isdigit()]  # and the run's status
        found = {int(file.name): np.fromfile(file, np.float64) for file in files}
        return {
            rank: numbers for rank, numbers in sorted(found.items()) if numbers.size == len(NUMBERS) and numbers[PID]
        }

    def _judge(self, ranks: dict[int, np.ndarray]) -> str | None:
        stopped = [rank for rank, numbers in ranks.items() if _is_stopped(numbers[PID])]
        still = {rank: self._seconds_still(rank, numbers, rank in stopped) for rank, numbers in ranks.items()}
        if stopped:
            is_over = min(still[rank] for rank in stopped) > PATIENCE_SECONDS
            return self._verdict(ranks, stopped, PATIENCE_SECONDS) if is_over else None
        patience = {rank: numbers[PATIENCE] for rank, numbers in ranks.items()}
        spent = min((patience[rank] for rank in ranks if 0 < patience[rank] < still[rank]), default=None)
        if spent is None or any(still[rank] <= max(spent, patience[rank]) for rank in ranks):
            return None  # while one rank gets on, or may yet, the others may have to wait for it
        counted = {rank: numbers[COUNT] + numbers[COMPUTED] for rank, numbers in ranks.items()}
        least = [rank for rank in ranks if counted[rank] == min(counted.values())]
        hint = f" (if it is only slow: {HUNG_AFTER}={2 * spent:.0f})"
        return self._verdict(ranks, least, spent) + hint

    def _verdict(self, ranks: dict[int, np.ndarray], guilty: list[int], seconds: float) -> str:
        names = ", ".join(f"{rank} (pid {ranks[rank][PID]:.0f} on {socket.gethostname()})" for rank in guilty)
        elsewhere = ", here or on a machine it waits for" if self.machines > 1 else ""
        return f"rank {names}: no progress for {seconds:.0f} s{elsewhere}; all ranks were ended"

    def _seconds_still(self, rank: int, numbers: np.ndarray, stopped: bool) -> float:
        now = time.monotonic()
        bytes_moved = _bytes_moved(numbers[PID]) if numbers[FILES] else 0
        state = (*numbers, stopped, bytes_moved)
        waits_for_disk = numbers[FILES] and _waits_for_disk(numbers[PID])
        if waits_for_disk or self._seen.get(rank, (None,))[0] != state:
            self._seen[rank] = state, now
        return now - self._seen[rank][1]

    def _end_all(self) -> None:
        for numbers in self._ranks().values():
            self._end(int(numbers[PID]))

    def _end(self, pid: int) -> None:
        if psutil.pid_exists(pid):
            self.ended.add(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _is_stopped(pid: int) -> bool:
    """Whether the process got SIGSTOP, from a debugger or a job control."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(int(pid)).status() == psutil.STATUS_STOPPED
    return False


def _bytes_moved(pid: int) -> int:
    """Read and written since the process started; what it maps counts when it comes from the disk."""
    with suppress(psutil.Error):
        moved = psutil.Process(int(pid)).io_counters()
        return moved.read_chars + moved.write_chars + moved.read_bytes
    return 0


def _waits_for_disk(pid: int) -> bool:
    """Whether one of the process's threads is in uninterruptible sleep, as within fsync (Linux, proc(5))."""
    for stat in Path(f"/proc/{pid:.0f}/task").glob("*/stat"):
        with suppress(OSError):
            if stat.read_text().rpartition(")")[2].split()[0] == "D":
                return True
    return False
