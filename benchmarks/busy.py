"""How busy a run keeps its GPU: one step under torch.profiler, its kernels summed by name.

    python benchmarks/busy.py RESULT.json RECIPE --profile NAME --work FOLDER [--set KEY=VALUE ...]

A run of one process, as `cli.py train` resolves it, is trained in this one. What is profiled is its fourth step: the
first ones compile and warm up. Profiling slows the CPU, so without it the GPU waits less. RESULT.json holds a list of
runs; this one is added.
"""

import argparse
import json
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
GAPS_MS = (0, 0.01, 0.1, 1, 1000)
"""Short gaps are the GPU's own between two kernels, long ones those in which it waits for Python."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("recipe")
    parser.add_argument("--profile", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    folder = _run_folder(options)
    Busy.found = {}
    training.Measurements = Busy
    training.train(runs.load(folder))
    measured = json.loads((folder / "measurements.json").read_text(encoding="utf-8"))
    report = about(options.commit) | {"command": " ".join(sys.argv), "set": options.set, **Busy.found}
    report["step_seconds_without_profiler"] = measured["step_seconds"]
    before = json.loads(options.result.read_text(encoding="utf-8")) if options.result.exists() else []
    options.result.write_text(json.dumps([*before, report], indent=1) + "\n", encoding="utf-8")
    print({key: report[key] for key in ("wall_s", "gpu_s", "busy", "kernels", "step_seconds_without_profiler")})


def _run_folder(options: argparse.Namespace) -> Path:
    """With a run.yaml as `train` writes it."""
    folder = options.work / "busy"
    folder.mkdir(parents=True, exist_ok=True)
    sets = [f"training.max_steps={STEPS}", "training.save_strategy='no'", "training.report_to=none", *options.set]
    flags = [part for value in sets for part in ("--set", value)]
    train = ["train", options.recipe, "--profile", options.profile, "--output", str(folder), *flags, "--dry-run"]
    done = subprocess.run([sys.executable, "cli.py", *train], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    (folder / "run.yaml").write_text(done.stdout, encoding="utf-8")
    return folder


class Busy(Measurements):
    """Profiles one step beside what is measured anyway."""

    found: dict

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == PROFILED_STEP:
            _wait()
            self.profiler = torch.profiler.profile()
            self.profiler.start()
            self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == PROFILED_STEP + 1:
            _wait()
            wall = time.perf_counter() - self.began
            self.profiler.stop()
            Busy.found = _summed(self.profiler, wall)
            self.mark = None  # stopping took its time
        super().on_step_end(args, state, control, **kwargs)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _summed(profiler: torch.profiler.profile, wall: float) -> dict:
    """Seconds in which at least one kernel runs; the kernels that take most; where none runs, by how long."""
    kernels = [
        event for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and event.device_time_total
    ]  # fmt: skip
    kernels.sort(key=lambda event: event.time_range.start)
    computed, until, gaps = 0.0, 0.0, []
    for event in kernels:
        start, end = event.time_range.start, event.time_range.end
        if until and start > until:
            gaps.append({"ms": round((start - until) / 1000, 4), "before": event.name})
        computed += max(0.0, end - max(start, until))
        until = max(until, end)
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        by_name[event.name].append(event.time_range.elapsed_us() / 1000)
    longest = sorted(by_name.items(), key=lambda pair: -sum(pair[1]))[:LONGEST]
    return {
        "wall_s": round(wall, 4), "gpu_s": round(computed / 1e6, 4), "busy": round(computed / 1e6 / wall, 4),
        "kernels": len(kernels),
        "gaps_ms": {f"up to {most} ms": round(sum(gap["ms"] for gap in gaps if least < gap["ms"] <= most), 1)
                    for least, most in pairwise(GAPS_MS)},
        "longest_gaps": sorted(gaps, key=lambda gap: -gap["ms"])[:LONGEST],
        "longest": [{"ms": round(sum(ms), 1), "calls": len(ms), "kernel": name} for name, ms in longest],
    }  # fmt: skip


if __name__ == "__main__":
    main()
