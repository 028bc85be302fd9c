"""One run of a tier through `cli.py train`, and its resume: memory of GPU and machine, speed, losses."""

import datetime
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "liger-kernel")


class Watcher(threading.Thread):
    """Samples the GPU's and the machine's used memory, above what was used before, until stopped."""

    def __init__(self):
        super().__init__(daemon=True)
        self.stopped = threading.Event()
        self.gpu_before, self.host_before = self._gpu_used(), self._host_used()
        self.gpu_peak = self.host_peak = 0.0

    @staticmethod
    def _gpu_used() -> float:
        out = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=True,
        )
        return sum(map(float, out.stdout.split())) / 1024

    @staticmethod
    def _host_used() -> float:
        memory = psutil.virtual_memory()
        return (memory.total - memory.available) / GIB

    def run(self):
        while not self.stopped.wait(0.5):
            self.gpu_peak = max(self.gpu_peak, self._gpu_used() - self.gpu_before)
            self.host_peak = max(self.host_peak, self._host_used() - self.host_before)

    def stop(self):
        self.stopped.set()
        self.join()


def run_tier(plan: dict, work: Path) -> dict:
    """One run of a plan: its measurements, or the error it ended with."""
    output, command = output_folder(plan, work), train_command(plan, work)
    shutil.rmtree(output, ignore_errors=True)
    watcher = Watcher()
    watcher.start()
    started = time.time()
    code, tail = _call(command, plan)
    seconds = time.time() - started
    watcher.stop()
    result = {
        "profile": plan["profile"],
        "recipe": plan["recipe"],
        "ok": code == 0,
        "seconds": round(seconds, 1),
        "gpu_cap_gib": plan["cap_gib"],
        "command": " ".join(["python", *command[1:]]),
    }
    if code:
        return result | {"error": tail[-3000:]}
    return result | _described(output, plan, watcher)


def output_folder(plan: dict, work: Path) -> Path:
    return work / f"{plan['recipe']}-{plan['profile']}-{plan.get('label', 'run')}"


def train_command(plan: dict, work: Path) -> list[str]:
    steps = plan.get("steps", 3)
    sets = [
        f"base.model={plan['checkpoint']}",
        f"data.prepared={plan['data']}",
        f"training.max_steps={steps}",
        f"training.save_steps={max(1, steps - 1)}",
        "training.logging_steps=1",
        *plan.get("set", []),
    ]
    command = [sys.executable, "cli.py", "train", plan["recipe"], "--profile", plan["profile"]]
    return [*command, "--output", str(output_folder(plan, work)), *(part for item in sets for part in ("--set", item))]


def read_cold(checkpoint: Path) -> dict[str, float]:
    """Seconds for one sequential read of all weights; before and after it they leave the page cache."""
    files = sorted(checkpoint.glob("*.safetensors"))
    _drop_from_page_cache(files)
    buffer, started, total = memoryview(bytearray(64 * 2**20)), time.time(), 0
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                total += count
    seconds = time.time() - started
    _drop_from_page_cache(files)
    return {"plain_read_seconds": round(seconds, 2), "checkpoint_gib": round(total / GIB, 2)}


def _drop_from_page_cache(files: list[Path]) -> None:
    os.sync()  # only written pages can be dropped
    for file in files:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _call(command: list[str], plan: dict) -> tuple[int, str]:
    """The exit code and all that was printed; 124 after three times the seconds it should take."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"FITUNE_GPU_CAP_GIB": str(plan["cap_gib"]), "PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        out, _ = process.communicate(timeout=3 * plan["seconds"])
        return process.returncode, out
    except subprocess.TimeoutExpired:
        for rank in psutil.Process(process.pid).children(recursive=True):
            rank.send_signal(signal.SIGABRT)  # says where it stood
        time.sleep(2)
        process.kill()
        out, _ = process.communicate()
        return 124, out + "\ntimed out"


def _described(output: Path, plan: dict, watcher: Watcher) -> dict:
    import yaml

    run = yaml.safe_load((output / "run.yaml").read_text())
    measured = json.loads((output / "measurements.json").read_text())
    ranks = run["accelerate"]["num_processes"]
    reserved = sum(rank["peak_reserved_gib"] for rank in measured["ranks"])
    outside = max(0.0, watcher.gpu_peak - reserved) / ranks
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {
        "method": run["recipe"]["method"],
        "num_gpus": ranks,
        "offload": run["accelerate"]["offload_params"],
        "max_length": run["recipe"]["max_length"],
        "micro_batch": run["profile"]["micro_batch"],
        "gradient_accumulation_steps": run["gradient_accumulation_steps"],
        "activation_checkpointing": run["profile"]["activation_checkpointing"],
        "activation_offload": run["profile"]["activation_offload"],
        "layers": json.loads((Path(plan["checkpoint"]) / "config.json").read_text())["num_hidden_layers"],
        "peak_allocated_gib": round(measured["peak_allocated_gib"], 2),
        "peak_reserved_gib": round(measured["peak_reserved_gib"], 2),
        "outside_allocator_gib": round(outside, 2),
        "peak_gpu_gib": round(measured["peak_reserved_gib"] + outside, 2),
        "peak_host_gib": round(watcher.host_peak, 2),
        "peak_host_rss_sum_gib": round(sum(rank["peak_host_rss_gib"] for rank in measured["ranks"]), 2),
        "load_seconds": measured["load_seconds"],
        "step_seconds": measured["step_seconds"],
        "tokens_per_second_per_gpu": round(measured["tokens_per_second_per_gpu"], 1),
        "losses": [line["loss"] for line in lines if "loss" in line],
    }


def resume(plan: dict, work: Path) -> dict:
    """Runs the last step again from the checkpoint before it, and compares its loss."""
    output, command = output_folder(plan, work), train_command(plan, work)

    def last_loss():
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line][-1]

    before = last_loss()
    shutil.rmtree(max((output / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])))
    code, tail = _call([*command, "--resume"], plan)
    if code:
        return {"ok": False, "error": tail[-800:]}
    return {"ok": True, "loss": before, "resumed_loss": last_loss()}


def about(commit: str) -> dict:
    """What every published number says of its origin."""
    return {
        "gpu_name": torch.cuda.get_device_name() if torch.cuda.is_available() else "none, CPU",
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # liger-kernel, on a machine without a GPU
