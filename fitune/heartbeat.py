"""Each rank counts what it has done where the launcher can see it, so that a rank that hangs is found by name.

While a rank hangs, the others wait for it inside a collective and look as stuck as it does; the one that hangs has
counted the least. A rank says how long it may take until it counts again: five minutes while it joins the others, in
the first step, which compiles, and in the optimizer's; less while weights are read and layers computed; as long as it
needs while it downloads, prepares rows or saves. A stopped process is noticed at any time. A launcher sees the ranks of
its own machine.
"""

import os
import signal
import socket
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
from transformers import TrainerCallback

from fitune.errors import say_while_training

FOLDER = "FITUNE_HEARTBEATS"
"The environment variable by which a launcher tells its ranks where to count."
PATIENCE_SECONDS = float(os.environ.get("FITUNE_HUNG_AFTER_SECONDS", 45))
STARTING_SECONDS = max(300, PATIENCE_SECONDS)
READS_AT_MOST = 1e9
PAUSE_SECONDS = 5
"A launcher that slept so long between two looks was suspended, and its ranks with it."
PID, PATIENCE, COUNT = range(3)


class Heartbeat(TrainerCallback):
    """The counting side: three numbers in a memory-mapped file, no system call per count. Made before anything else.

    A patience of 0 seconds: the rank may rest.
    """

    def __init__(self):
        folder, rank = os.environ.get(FOLDER), os.environ.get("RANK", "0")
        shape = (3,)
        self.numbers = np.memmap(Path(folder) / rank, np.float64, "w+", shape=shape) if folder else np.zeros(shape)
        self.numbers[PID] = os.getpid()
        self.steps = 0

    def begin(self, patience: float) -> None:
        """Whoever watches may give this rank up when it has not counted for `patience` seconds."""
        self.numbers[PATIENCE] = patience

    def rest(self) -> None:
        self.numbers[PATIENCE] = 0

    @contextmanager
    def starting(self):
        """Of what should take seconds, but may wait for the slowest of many ranks."""
        self.begin(STARTING_SECONDS)
        yield
        self.rest()

    def count(self, *_) -> None:
        self.numbers[COUNT] += 1

    def count_read(self) -> None:
        """While weights are loaded."""
        self.begin(PATIENCE_SECONDS)
        self.count()

    def count_layers(self, layers) -> None:
        """From now on; a rank that has come so far is ahead of one that still reads, whatever their shares."""
        self.rest()
        self.numbers[COUNT] = READS_AT_MOST
        for layer in layers:
            layer.register_forward_pre_hook(self.count)
            layer.register_forward_hook(self.count)

    def on_step_begin(self, args, state, control, **kwargs):
        self.begin(PATIENCE_SECONDS if self.steps else STARTING_SECONDS)
        self.steps += 1

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.begin(STARTING_SECONDS)  # no layer computes; offloaded, all parameters of a machine pass through its CPU

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.begin(PATIENCE_SECONDS)

    def on_step_end(self, args, state, control, **kwargs):
        self.rest()

    def on_prediction_step(self, args, state, control, **kwargs):
        self.begin(PATIENCE_SECONDS)

    def on_evaluate(self, args, state, control, **kwargs):
        self.rest()


class Watch(threading.Thread):
    """The launcher's side: kills all ranks of this machine once one of them hangs, and says which."""

    def __init__(self, folder: Path):
        super().__init__(daemon=True)
        self.folder = folder
        self.ended: set[int] = set()
        "Processes that were killed, and the reason printed."
        self._over = threading.Event()
        self._seen: dict[int, tuple[tuple, float]] = {}

    def run(self) -> None:
        polled = time.monotonic()
        while not self._over.wait(1):
            if time.monotonic() - polled > PAUSE_SECONDS:
                self._seen.clear()
            polled = time.monotonic()
            ranks = {int(file.name): np.fromfile(file, np.float64) for file in self.folder.iterdir()}
            ranks = {rank: numbers for rank, numbers in sorted(ranks.items()) if numbers.size == 3}
            if verdict := self._judge(ranks):
                say_while_training(f"error: {verdict}")
                self.ended.update(int(numbers[PID]) for numbers in ranks.values())
                for pid in self.ended:
                    _kill(pid)
                return

    def stop(self) -> None:
        self._over.set()
        self.join()

    def _judge(self, ranks: dict[int, np.ndarray]) -> str | None:
        stopped = [rank for rank, numbers in ranks.items() if _is_stopped(numbers[PID])]
        still = {rank: self._seconds_still(rank, (*numbers, rank in stopped)) for rank, numbers in ranks.items()}
        patience = {rank: PATIENCE_SECONDS if rank in stopped else ranks[rank][PATIENCE] for rank in ranks}
        spent = [patience[rank] for rank in ranks if patience[rank] and still[rank] > patience[rank]]
        if not spent:
            return None
        # of all ranks: the one that hangs may have moved a moment longer than those that wait for it
        fewest = min(numbers[COUNT] for numbers in ranks.values())
        guilty = stopped or [rank for rank, numbers in ranks.items() if numbers[COUNT] == fewest]
        names = ", ".join(f"{rank} (pid {ranks[rank][PID]:.0f} on {socket.gethostname()})" for rank in guilty)
        return f"rank {names}: no progress for {min(spent):.0f} s; all ranks were ended"

    def _seconds_still(self, rank: int, state: tuple) -> float:
        now = time.monotonic()
        if self._seen.get(rank, (None,))[0] != state:
            self._seen[rank] = state, now
        return now - self._seen[rank][1]


def _is_stopped(pid: int) -> bool:
    """Whether the process got SIGSTOP, from a debugger or a job control."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(int(pid)).status() == psutil.STATUS_STOPPED
    return False


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
