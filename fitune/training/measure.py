"""Measures a run: what loading takes and reads, memory peaks of every rank, tokens per second."""

import json
import os
import resource
import time
from pathlib import Path
from statistics import median

import torch
from transformers import TrainerCallback

from fitune.training.distributed import from_all_ranks

GIB = 2**30


class Loading:
    """A with-block: what this rank's loading took within it is its `report`; peaks count from the process's start."""

    def __enter__(self):
        self.started, self.read_before = time.perf_counter(), _bytes_read()
        return self

    def __exit__(self, *_):
        self.report = {
            "seconds": round(time.perf_counter() - self.started, 2),
            "read_gib": round((_bytes_read() - self.read_before) / GIB, 3),
            **process_peaks(),
        }


class Measurements(TrainerCallback):
    """Writes measurements.json to the run's folder when training ends.

    `loading` is this rank's `Loading.report`, `planned_gib` what `plan` says that torch allocates on a GPU at its peak.
    """

    def __init__(self, folder: Path, loading: dict[str, float], planned_gib: float | None = None):
        self.file = folder / "measurements.json"
        self.loading, self.planned_gib = loading, planned_gib
        self.steps: list[tuple[float, float]] = []  # (seconds, tokens) of each optimizer step but the first
        self.mark: tuple[float, float] | None = None  # (time, tokens so far) from where the next step counts
        self.optimizer_seconds: list[float] = []  # of the CPU: all they take where weights are offloaded
        self.gradients: set[torch.dtype] = set()
        self.tokens_so_far = lambda: 0.0
        self.logged = 0  # of `steps`

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self.optimizer_seconds:
            gradients = [parameter.grad for parameter in kwargs["model"].parameters()]
            self.gradients = {gradient.dtype for gradient in gradients if gradient is not None}
        self.optimizer_seconds.append(-time.perf_counter())

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.optimizer_seconds[-1] += time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        before = self.mark
        self._count_from_here()
        if before:
            self.steps.append((self.mark[0] - before[0], self.mark[1] - before[1]))

    def on_save(self, args, state, control, **kwargs):
        self._count_from_here()

    def on_evaluate(self, args, state, control, **kwargs):
        self._count_from_here()

    def _count_from_here(self) -> None:
        self.mark = time.perf_counter(), self.tokens_so_far()

    def since_last_log(self) -> dict[str, float]:
        """Of the steps since the last call, tokens per second of all ranks; this GPU's peak so far beside the plan's.

        Like `tokens_per_second` in measurements.json, without the first step, saves and evaluations.
        """
        seconds, tokens = (sum(numbers) for numbers in zip((0, 0), *self.steps[self.logged :], strict=True))
        self.logged = len(self.steps)
        values = {"tokens_per_second": round(tokens / seconds, 1)} if seconds else {}
        if peak := process_peaks()["peak_allocated_gib"]:
            values["gpu_memory_gib"] = round(peak, 3)
            values |= {"gpu_memory_planned_gib": round(self.planned_gib, 3)} if self.planned_gib else {}
        return values

    def on_train_end(self, args, state, control, **kwargs):
        ranks = from_all_ranks({"pid": os.getpid(), **process_peaks(), "loading": self.loading})
        if state.is_world_process_zero:
            report = {
                "load_seconds": max(rank["loading"]["seconds"] for rank in ranks),
                "tokens_per_second": self._tokens_per_second(),
                "tokens_per_second_per_gpu": self._tokens_per_second() / len(ranks),
                "step_seconds": [round(seconds, 3) for seconds, _ in self.steps],
                "step_tokens": [tokens for _, tokens in self.steps],
                "optimizer": type(kwargs["optimizer"].optimizer).__name__,  # inside accelerate's wrapper
                "gradients": ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in self.gradients)),
                "optimizer_seconds": [round(seconds, 3) for seconds in self.optimizer_seconds],
                "peak_allocated_gib": max(rank["peak_allocated_gib"] for rank in ranks),
                "peak_reserved_gib": max(rank["peak_reserved_gib"] for rank in ranks),
                "ranks": ranks,
            }
            self.file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    def _tokens_per_second(self) -> float:
        """The median step's, over all ranks; the first, which compiles, saves and evaluations don't count."""
        return median(tokens / seconds for seconds, tokens in self.steps) if self.steps else 0.0


def process_peaks() -> dict[str, float]:
    """Peak memory of this process in GiB: torch's allocator on the GPU, and resident host memory."""
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB if on_gpu else 0.0,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB if on_gpu else 0.0,
        "peak_host_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
    }


def _bytes_read() -> int:
    """By this process, through read calls (Linux, proc(5)); 0 in a sandbox that does not tell."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("rchar:")), 0)
