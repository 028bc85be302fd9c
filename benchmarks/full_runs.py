"""Full fine-tuning on cards of given sizes, beside what `plan` said before: `benchmarks/full_runs.json` lists the runs.

    python benchmarks/full_runs.py RESULT.json --models FOLDER --data FOLDER --seconds 300 [--only NAME ...]

Each run goes through `cli.py train`, its ranks held to `cap_gib` of torch's memory, and is stopped when it has been
measured: its weights are not written. Runs of one GPU have one of their own, side by side; those of several come
after them, alone. `--models` holds checkpoints of `benchmarks/random_checkpoint.py`, by name, `--data` what `prepare`
made. What RESULT.json has already is not run again, and nothing begins that would not end in time.
"""

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml
from tier_run import ROOT, about, kill_all, visible_gpus

from fitune.config.model_shapes import find_shape
from fitune.environment import GPU_CAP

ENTRIES = ROOT / "benchmarks" / "full_runs.json"
SETTLES_SECONDS = 3
"What a GPU's memory takes to be free after a run."
IDLE_GIB = 0.6
"What nvidia-smi shows of a GPU that nobody uses, at most: the driver's own. A CUDA context is 0.5 and more beside it."


class Report:
    """RESULT.json, written after each run."""

    def __init__(self, file: Path, commit: str):
        self.file = file
        self.runs = json.loads(file.read_text())["runs"] if file.exists() else {}
        self.head = {
            "benchmark": "full fine-tuning on cards of given sizes, and what `plan` said before",
            "gpus": torch.cuda.device_count(), **about(commit), "command": " ".join(["python", *sys.argv]),
            "note": "random weights; the first step is not timed; torch may take gpu_cap_gib of each GPU",
        }  # fmt: skip
        self.lock = threading.Lock()

    def add(self, name: str, result: dict) -> None:
        with self.lock:
            self.runs[name] = result
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(self.head | {"runs": self.runs}, indent=1) + "\n")


def entries(only: list[str]) -> list[dict]:
    known = json.loads(ENTRIES.read_text(encoding="utf-8"))
    if unknown := set(only) - {entry["name"] for entry in known}:
        raise SystemExit(f"--only {', '.join(sorted(unknown))}: not in {ENTRIES.name}")
    return [entry for entry in known if not only or entry["name"] in only]


def sets_of(entry: dict, options: argparse.Namespace) -> dict:
    """What the run is told beside recipe and profile."""
    return {
        "base.model": str(options.models / entry["checkpoint"]), "data.prepared": str(options.data),
        "data.chat_template": "plain", "data.system_message": "null", "training.max_steps": entry["steps"],
        "training.logging_steps": 1, "training.save_strategy": "'no'", "training.report_to": "none", **entry["set"],
    }  # fmt: skip


def flags_of(entry: dict, options: argparse.Namespace) -> list[str]:
    """Recipe, profile and settings, as `plan` and `train` take them."""
    sets = [part for key, value in sets_of(entry, options).items() for part in ("--set", f"{key}={value}")]
    return [entry["recipe"], "--profile", entry["profile"], *sets]


def environment_of(entry: dict, gpus: str) -> dict[str, str]:
    cap = {GPU_CAP: str(entry["cap_gib"])} if "cap_gib" in entry else {}
    return os.environ | {"CUDA_VISIBLE_DEVICES": gpus} | cap


def planned(entry: dict, gpus: str, options: argparse.Namespace) -> dict:
    """GiB and seconds that `plan` says of the run on these GPUs, and the rows and layers that it chooses for them."""
    command = [sys.executable, "cli.py", "plan", *flags_of(entry, options), "--json"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment_of(entry, gpus), capture_output=True, text=True, check=False
    )
    if not done.stdout:
        raise RuntimeError(done.stderr)
    said = json.loads(done.stdout)
    return {
        "micro_batch": said["micro_batch"], "kept_layers": said["kept_layers"], "replicas": said["replicas"],
        "allocated_gib": said["peak_allocated_gib"], "all_gib": said["peak_gpu_gib"], "host_gib": said["peak_host_gib"],
        "step_seconds": said["estimate"] and said["estimate"]["step_seconds"],
    }  # fmt: skip


def folder_name(entry: dict) -> str:
    return entry["name"].replace(",", "").replace(" ", "-")


def used_gib(gpus: str) -> float:
    """What nvidia-smi shows of the fullest of these GPUs; 0 without any."""
    command = ["nvidia-smi", "-i", gpus, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
        return max(int(line) for line in lines) / 1024
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0.0


def measured(entry: dict, gpus: str, seconds: float, options: argparse.Namespace) -> dict:
    """Trains until measurements.json is there or the seconds are over."""
    folder = options.work / folder_name(entry)
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "cli.py", "train", *flags_of(entry, options), "--output", str(folder), "--force"]
    log, found = options.work / f"{folder.name}.log", folder / "measurements.json"
    of_others = used_gib(gpus)
    end, began, peak = time.monotonic() + seconds, time.monotonic(), 0.0
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env=environment_of(entry, gpus), stdout=stream, stderr=stream)
        while process.poll() is None and time.monotonic() < end and not found.exists():
            peak = max(peak, used_gib(gpus))
            time.sleep(0.5)
    time.sleep(SETTLES_SECONDS if found.exists() else 0)  # until it is whole
    kill_all(process)
    if not found.exists():
        outcome = "no time left" if time.monotonic() >= end else f"exit code {process.returncode}"
        return {"error": f"{outcome}: {log.read_text(errors='replace')[-2000:]}"}
    result = described(folder) | {"peak_by_nvidia_smi_gib": round(peak, 1), "seconds": round(time.monotonic() - began)}
    if of_others > IDLE_GIB:
        result["disturbed"] = f"{of_others:.1f} GiB of the GPU were in use before"
    shutil.rmtree(folder)
    time.sleep(SETTLES_SECONDS)
    return result


def described(folder: Path) -> dict:
    run = yaml.safe_load((folder / "run.yaml").read_text())
    report = json.loads((folder / "measurements.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    per_gpu = report["tokens_per_second_per_gpu"]
    return {
        "micro_batch": run["profile"]["micro_batch"], "kept_layers": run["profile"]["kept_layers"],
        "replicas": run["profile"]["replicas"],
        "accumulation": run["gradient_accumulation_steps"],
        "median_tokens_per_second": round(report["tokens_per_second"]),
        "median_tokens_per_second_per_gpu": round(per_gpu),
        **{key: report[key] for key in ("step_seconds", "step_tokens", "load_seconds")},
        **{key: report[key] for key in ("optimizer", "gradients", "optimizer_seconds")},
        **{key: round(report[key], 2) for key in ("peak_allocated_gib", "peak_reserved_gib")},
        "peak_host_rss_sum_gib": round(sum(rank["peak_host_rss_gib"] for rank in report["ranks"]), 2),
        "losses": [line["loss"] for line in lines if "loss" in line],
        "grad_norms": [line["grad_norm"] for line in lines if "loss" in line],
    }  # fmt: skip


def run_one(entry: dict, gpus: str, report: Report, options: argparse.Namespace) -> None:
    left = options.end - time.monotonic()
    name = entry["name"]
    if "error" not in report.runs.get(name, {"error": ""}):
        return
    if left < entry["seconds"]:
        print(f"{name}: not begun, {left:.0f} of {entry['seconds']} s left", flush=True)
        return
    kept = ("recipe", "profile", "model", "checkpoint", "set")
    result = {key: entry[key] for key in kept} | {"gpus": entry["gpus"], "gpu_cap_gib": entry.get("cap_gib")}
    try:
        result["layers"] = find_shape(str(options.models / entry["checkpoint"])).layers
        result["planned"] = planned(entry, gpus, options)
        result |= measured(entry, gpus, min(left, 2 * entry["seconds"]), options)
    except Exception as error:
        result["error"] = repr(error)
    report.add(name, result)
    print(line_of(name, result), flush=True)


def line_of(name: str, run: dict) -> str:
    """What was measured, and in brackets what was planned."""
    if "error" in run:
        return f"{name}: FAILED {run['error'][-600:]}"
    plan, seconds = run["planned"], median(run["step_seconds"]) if run["step_seconds"] else 0.0
    return (
        f"{name:<34} torch {run['peak_allocated_gib']:6.2f} ({plan['allocated_gib']:6.2f})  all "
        f"{run['peak_by_nvidia_smi_gib']:5.1f} ({plan['all_gib']:5.1f})  RAM {run['peak_host_rss_sum_gib']:5.1f} "
        f"({plan['host_gib']:5.1f})  step {seconds:5.2f} ({plan['step_seconds'] or 0:5.2f}) s  "
        f"{run['median_tokens_per_second_per_gpu']:6,} tokens/s a GPU  {run['seconds']} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/full-runs"))
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    options.end = time.monotonic() + options.seconds
    options.work.mkdir(parents=True, exist_ok=True)
    report, chosen = Report(options.result, options.commit), entries(options.only)
    gpus = visible_gpus() or ["0"]
    waiting = queue.SimpleQueue()
    for entry in (entry for entry in chosen if entry["gpus"] == 1):
        waiting.put(entry)

    def serve(gpu: str) -> None:
        while not waiting.empty():
            run_one(waiting.get(), gpu, report, options)

    threads = [threading.Thread(target=serve, args=(gpu,)) for gpu in gpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for entry in (entry for entry in chosen if entry["gpus"] > 1):
        run_one(entry, ",".join(gpus[: entry["gpus"]]), report, options)


if __name__ == "__main__":
    main()
