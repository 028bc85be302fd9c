"""How busy a run keeps its GPU: one step under torch.profiler, its kernels summed by name.

    python benchmarks/busy.py RESULT.json RECIPE --profile NAME --work FOLDER [--set KEY=VALUE …] [--trace FILE]

A run as `cli.py train` resolves it is trained in this process; one of several GPUs in as many, of which the first is
profiled. That is done in its fourth step: the first ones compile and warm up. Only kernels are recorded, which slows
Python little. RESULT.json holds a list of runs; this one is added. `--trace` keeps all that the profiler saw, as Chrome
reads it, packed where the file's name ends in .gz. Then Python's operations are recorded, too. They are slower for it,
and the GPU, which waits for them, computes faster than in other steps: it has power to spare.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tier_run import ROOT, about

from fitune.config import run as runs
from fitune.training import train as training
from fitune.training.measure import Measurements

PROFILED_STEP, STEPS = 3, 5
"From 0; in all."
LONGEST = 25
"Kernels, and gaps between them, that are told by name."
MOVES_DATA = ("nccl", "Memcpy", "Memset")
"How the names of kernels begin that bring data from other GPUs or from host RAM."
GAPS_MS = (0, 0.01, 0.1, 1, 1000)
"""Short gaps are the GPU's own between two kernels, long ones those in which it waits for Python."""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--trace", type=Path)
    options = parser.parse_args()
    rank, folder = os.environ.get("RANK"), options.work / "busy"
    if rank is None:
        write_run_file(folder, options, STEPS)
    run = runs.load(folder)
    if rank is None and run.accelerate.num_processes > 1:
        ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={run.accelerate.num_processes}"]
        sys.exit(subprocess.run([sys.executable, *ranks, *sys.argv], check=False).returncode)
    training.ShardedSFTTrainer.save_model = training.check_result = lambda *_: None  # a whole model, of some
    if rank in (None, "0"):
        training.Measurements = Busy
    Busy.trace = options.trace
    training.train(run)
    if rank in (None, "0"):
        _report(folder, options)


def _report(folder: Path, options: argparse.Namespace) -> None:
    measured = json.loads((folder / "measurements.json").read_text(encoding="utf-8"))
    report = about(options.commit) | {"command": " ".join(sys.argv), "set": options.set, **Busy.found}
    report["python_recorded"] = _recorded() is None
    report["step_seconds_without_profiler"] = measured["step_seconds"]
    add_to(options.result, report)
    print({key: report[key] for key in ("wall_s", "gpu_s", "busy", "kernels", "step_seconds_without_profiler")})


def add_to(result: Path, report: dict) -> None:
    """A list of runs, which is made with the first."""
    before = json.loads(result.read_text(encoding="utf-8")) if result.exists() else []
    result.write_text(json.dumps([*before, report], indent=1) + "\n", encoding="utf-8")


def arguments(text: str) -> argparse.ArgumentParser:
    """Of a program that trains one run in its own process."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("recipe")
    parser.add_argument("--profile", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--commit", default="unknown")
    return parser


def write_run_file(folder: Path, options: argparse.Namespace, steps: int) -> None:
    """The run.yaml that `train` would write."""
    folder.mkdir(parents=True, exist_ok=True)
    sets = [f"training.max_steps={steps}", "training.save_strategy='no'", "training.report_to=none", *options.set]
    flags = [part for value in sets for part in ("--set", value)]
    train = ["train", options.recipe, "--profile", options.profile, "--output", str(folder), *flags, "--dry-run"]
    done = subprocess.run([sys.executable, "cli.py", *train], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    (folder / "run.yaml").write_text(done.stdout, encoding="utf-8")


class Busy(Measurements):
    """Profiles one step beside what is measured anyway."""

    found: dict
    trace: Path | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == PROFILED_STEP:
            _wait()
            self.profiler = torch.profiler.profile(activities=_recorded())
            self.profiler.start()
            self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == PROFILED_STEP + 1:
            _wait()
            wall = time.perf_counter() - self.began
            self.profiler.stop()
            Busy.found = _summed(self.profiler, wall)
            if Busy.trace:
                self.profiler.export_chrome_trace(str(Busy.trace))
            self.mark = None  # stopping took its time
        super().on_step_end(args, state, control, **kwargs)


def _recorded() -> list[torch.profiler.ProfilerActivity] | None:
    """None: all there is."""
    return [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() and not Busy.trace else None


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _summed(profiler: torch.profiler.profile, wall: float) -> dict:
    """Seconds in which a kernel runs, or only ones that move data; those that take most; where none runs, how long."""
    kernels = [
        event for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and event.device_time_total
        and not event.is_user_annotation  # these last from an operation's first kernel to its last
    ]  # fmt: skip
    kernels.sort(key=lambda event: event.time_range.start)
    busy, gaps = _covered(kernels)
    computing, _ = _covered([event for event in kernels if not event.name.startswith(MOVES_DATA)])
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        by_name[event.name].append(event.time_range.elapsed_us() / 1000)
    longest = sorted(by_name.items(), key=lambda pair: -sum(pair[1]))[:LONGEST]
    return {
        "wall_s": round(wall, 4), "gpu_s": round(busy, 4), "busy": round(busy / wall, 4),
        "only_moving_data_s": round(busy - computing, 4), "kernels": len(kernels),
        "gaps_ms": {f"up to {most} ms": round(sum(gap["ms"] for gap in gaps if least < gap["ms"] <= most), 1)
                    for least, most in pairwise(GAPS_MS)},
        "longest_gaps": sorted(gaps, key=lambda gap: -gap["ms"])[:LONGEST],
        "longest": [{"ms": round(sum(ms), 1), "calls": len(ms), "kernel": name} for name, ms in longest],
    }  # fmt: skip


def _covered(kernels: list) -> tuple[float, list[dict]]:
    """Seconds in which at least one of these runs, sorted by their start; the gaps between them."""
    covered, until, gaps = 0.0, 0.0, []
    for event in kernels:
        start, end = event.time_range.start, event.time_range.end
        if until and start > until:
            gaps.append({"ms": round((start - until) / 1000, 4), "before": event.name})
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered / 1e6, gaps


if __name__ == "__main__":
    main()
