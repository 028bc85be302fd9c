"""Each rank counts the layers it begins where the launcher can see it, so that a rank that hangs is found by name.

While a rank hangs, the others wait for it inside a collective and look as stuck as it does; the one that hangs has
begun the fewest layers. Only the steps after the first are watched for that: loading, compiling, saving and evaluating
may take as long as they need. A stopped process is noticed at any time. A launcher sees the ranks of its own machine.
"""

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
from transformers import TrainerCallback

FOLDER = "FITUNE_HEARTBEATS"
"The environment variable by which a launcher tells its ranks where to count."
PATIENCE_SECONDS = float(os.environ.get("FITUNE_HUNG_AFTER_SECONDS", 45))
PID, WATCHED, LAYERS = range(3)


class Heartbeat(TrainerCallback):
    """The counting side: three numbers in a memory-mapped file, no system call per layer. Made before anything else."""

    def __init__(self):
        folder, rank = os.environ.get(FOLDER), os.environ.get("RANK", "0")
        shape = (3,)
        self.numbers = np.memmap(Path(folder) / rank, np.int64, "w+", shape=shape) if folder else np.zeros(shape)
        self.numbers[PID] = os.getpid()
        self.steps = 0

    def count(self, layers) -> None:
        for layer in layers:
            layer.register_forward_pre_hook(self._count)

    def _count(self, *_) -> None:
        self.numbers[LAYERS] += 1

    def on_step_begin(self, args, state, control, **kwargs):
        self.numbers[WATCHED] = self.steps > 0
        self.steps += 1

    def on_step_end(self, args, state, control, **kwargs):
        self.numbers[WATCHED] = 0


class Watch(threading.Thread):
    """The launcher's side: kills all ranks of this machine once one of them hangs, and says which."""

    def __init__(self, folder: Path):
        super().__init__(daemon=True)
        self.folder = folder
        self._over = threading.Event()
        self._seen: dict[int, tuple[tuple, float]] = {}

    def run(self) -> None:
        while not self._over.wait(1):
            ranks = {int(file.name): np.fromfile(file, np.int64) for file in self.folder.iterdir()}
            ranks = {rank: numbers for rank, numbers in sorted(ranks.items()) if numbers.size == 3}
            if verdict := self._judge(ranks):
                print(f"error: {verdict}", file=sys.stderr, flush=True)
                for numbers in ranks.values():
                    _kill(int(numbers[PID]))
                return

    def stop(self) -> None:
        self._over.set()
        self.join()

    def _judge(self, ranks: dict[int, np.ndarray]) -> str | None:
        stuck = [rank for rank, numbers in ranks.items() if self._seconds_still(rank, numbers) > PATIENCE_SECONDS]
        if not stuck:
            return None
        # of all ranks: the one that hangs may have moved a moment longer than those that wait for it
        stopped = [rank for rank in ranks if _is_stopped(ranks[rank][PID])]
        fewest = min(numbers[LAYERS] for numbers in ranks.values())
        guilty = stopped or [rank for rank, numbers in ranks.items() if numbers[LAYERS] == fewest]
        names = ", ".join(f"{rank} (pid {ranks[rank][PID]} on {socket.gethostname()})" for rank in guilty)
        return f"rank {names}: no progress for {PATIENCE_SECONDS:.0f} s; all ranks were ended"

    def _seconds_still(self, rank: int, numbers: np.ndarray) -> float:
        now, state = time.monotonic(), tuple(numbers)
        may_rest = not numbers[WATCHED] and not _is_stopped(numbers[PID])
        if may_rest or self._seen.get(rank, (None,))[0] != state:
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
