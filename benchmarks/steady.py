"""Why steps of equal work differ: each step's time on the GPU beside the GPU's clock and power.

    python benchmarks/steady.py RESULT.json RECIPE --profile NAME --work FOLDER [--steps N] [--set KEY=VALUE …]

A run on one GPU as `cli.py train` resolves it is trained in this process. Where long steps are those of a low clock,
the limit of power sets the pace. Where the clock is the same, or higher, the GPU waited: for memory that PyTorch gave
back and asked for again, which is counted, or else for Python. RESULT.json holds a list of runs; this one is added.
"""

import shutil
import subprocess
import sys
import threading
import time
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import correlation, mean
from typing import ClassVar

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from busy import add_to, arguments, write_run_file
from tier_run import about, visible_gpus

from fitune.config import run as runs
from fitune.training import train as training
from fitune.training.measure import Measurements

FIELDS = {"mhz": "clocks.sm", "watts": "power.draw.instant", "celsius": "temperature.gpu"}
EVERY_MS = 50
WARM_UP = 3
"Steps that are left out of the summary: they compile, and fill PyTorch's cache."


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    folder = options.work / f"steady-{time.time():.0f}"
    write_run_file(folder, options, options.steps)
    training.ShardedSFTTrainer.save_model = training.check_result = lambda *_: None
    training.Measurements = Steps
    with Watched(visible_gpus()[0]) as Steps.gpu:
        training.train(runs.load(folder))
    report = about(options.commit) | {"command": " ".join(sys.argv), "set": options.set, **summary(Steps.told())}
    add_to(options.result, report)
    print({key: value for key, value in report.items() if key not in ("set", "versions", "steps", "command")})


class Watched:
    """A with-block in which nvidia-smi is asked for a GPU's clock and power."""

    def __init__(self, gpu: str):
        self.gpu, self.samples = gpu, []

    def __enter__(self):
        fields = ",".join(("timestamp", *FIELDS.values()))
        asked = [f"--id={self.gpu}", f"--query-gpu={fields}", "--format=csv,noheader,nounits", f"--loop-ms={EVERY_MS}"]
        self.process = subprocess.Popen([shutil.which("nvidia-smi"), *asked], stdout=subprocess.PIPE, text=True)
        threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_):
        time.sleep(1)  # what it has not written yet
        self.process.terminate()
        self.process.wait()

    def _read(self) -> None:
        for line in self.process.stdout:
            at, *values = line.split(",")
            taken = datetime.strptime(at, "%Y/%m/%d %H:%M:%S.%f").timestamp()
            self.samples.append((taken, [float(value) for value in values]))

    def between(self, start: float, end: float) -> dict[str, float]:
        """Means between two times of the clock, in seconds; 0 where there was no sample."""
        within = [values for at, values in self.samples if start < at <= end]
        return {
            name: round(mean(values[n] for values in within), 1) if within else 0.0 for n, name in enumerate(FIELDS)
        }


class Steps(Measurements):
    """What each step ended with: an event on the GPU, the time, and how often memory was taken from CUDA."""

    gpu: Watched
    ends: ClassVar[list[dict]] = []

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()  # so that the clock is that of this step; a log waits for the GPU anyway
        stats = torch.cuda.memory_stats()
        counts = {"retries": stats["num_alloc_retries"], "mallocs": stats["num_device_alloc"]}
        self.ends.append({"event": event, "at": time.time(), **counts})

    @classmethod
    def told(cls) -> list[dict]:
        """A step: its seconds on the GPU and so on."""
        torch.cuda.synchronize()
        return [
            {"gpu_s": round(before["event"].elapsed_time(end["event"]) / 1000, 4),
             **{name: end[name] - before[name] for name in ("retries", "mallocs")},
             **cls.gpu.between(before["at"], end["at"])}
            for before, end in pairwise(cls.ends)
        ]  # fmt: skip


def summary(steps: list[dict]) -> dict:
    """How far apart steps are, in seconds and in clock cycles, and how seconds go with the clock: -1 is against it."""
    counted = steps[WARM_UP:]
    seconds, mhz = [step["gpu_s"] for step in counted], [step["mhz"] for step in counted]
    return {
        "seconds_apart": _apart(seconds),
        "cycles_apart": _apart([step["gpu_s"] * step["mhz"] for step in counted]) if min(mhz) else None,
        "seconds_with_clock": round(correlation(seconds, mhz), 2) if 0 < min(mhz) < max(mhz) else None,
        "most": {name: max(step[name] for step in counted) for name in ("retries", "mallocs", "watts")},
        "steps": steps,
    }


def _apart(values: list[float]) -> float:
    return round(max(values) / min(values) - 1, 4)


if __name__ == "__main__":
    main()
