"""One run of a tier through `cli.py train`, and its resume: memory of GPU and machine, speed, losses.

A plan without a profile (`None`) leaves it to the search; `environment` is added to that of the command.
"""

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
from contextlib import suppress
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fitune.output_folder import checkpoints
from fitune.planning.memory import MEASURED

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
FALLS_GIB = 0.05
"Less than this in a second is the machine's own coming and going."
AFTER_FIRST = "after_first_checkpoint.json"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "liger-kernel")


class Watcher(threading.Thread):
    """Samples the GPU memory of every process and the machine's, above what was used before, until stopped."""

    def __init__(self):
        super().__init__(daemon=True)
        self.stopped = threading.Event()
        self.gpu_before, self.host_before = _used_at_rest()
        self.gpu_peak = self.host_peak = 0.0
        self.gpu_peak_of: dict[int, float] = {}
        "By process; empty where the driver does not tell."
        self.missed = 0
        "Samples that the driver did not give."

    def run(self):
        while not self.stopped.wait(0.5):
            self.host_peak = max(self.host_peak, _host_used() - self.host_before)
            try:
                self.gpu_peak = max(self.gpu_peak, _gpu_used() - self.gpu_before)
                for pid, used in _gpu_used_by_process().items():
                    self.gpu_peak_of[pid] = max(self.gpu_peak_of.get(pid, 0.0), used)
            except (subprocess.CalledProcessError, ValueError):
                self.missed += 1

    def stop(self):
        self.stopped.set()
        self.join()


def _used_at_rest(seconds: int = 20) -> tuple[float, float]:
    """GiB in use on all GPUs and in the machine, once what ended before has given its memory back."""
    used = _gpu_used(), _host_used()
    for _ in range(seconds):
        time.sleep(1)
        earlier, used = used, (_gpu_used(), _host_used())
        if all(before - now < FALLS_GIB for before, now in zip(earlier, used, strict=True)):
            break
    return used


def _host_used() -> float:
    memory = psutil.virtual_memory()
    return (memory.total - memory.available) / GIB


def _gpu_used() -> float:
    """GiB, of all GPUs."""
    return sum(int(line) for line in _nvidia_smi("--query-gpu=memory.used")) / 1024


def _gpu_used_by_process() -> dict[int, float]:
    """GiB by process id, of all GPUs."""
    used: dict[int, float] = {}
    for line in _nvidia_smi("--query-compute-apps=pid,used_memory"):
        pid, mib = line.split(",")
        if mib.strip().isdigit():
            used[int(pid)] = used.get(int(pid), 0.0) + int(mib) / 1024
    return used


def _nvidia_smi(query: str) -> list[str]:
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


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
        **({"label": plan["label"]} if "label" in plan else {}),
        "ok": code == 0,
        "seconds": round(seconds, 1),
        "gpu_cap_gib": plan["cap_gib"],
        "command": " ".join(["python", *command[1:]]),
    }
    if chosen := [line for line in tail.splitlines() if line.startswith("plan chose")]:
        result["chosen"] = chosen[0]
    if code:
        return result | {"error": tail[-3000:]}
    result |= _described(output, plan, watcher)
    _make_room(output, plan)
    return result


def _make_room(output: Path, plan: dict) -> None:
    """Of what a run leaves on the disk, a resume needs the first checkpoint, and the curves that come after it."""
    if not plan.get("resume"):
        shutil.rmtree(output)
        return
    first, *later = checkpoints(output / "checkpoints")
    step = int(first.name.rpartition("-")[2])
    (output / AFTER_FIRST).write_text(json.dumps({"from_step": step, "before": _curves(_metrics(output), after=step)}))
    for folder in (*later, output / "adapter"):
        shutil.rmtree(folder)


def output_folder(plan: dict, work: Path) -> Path:
    return work / f"{plan['recipe']}-{plan['profile'] or 'found'}-{plan.get('label', 'run').replace(' ', '-')}"


def train_command(plan: dict, work: Path) -> list[str]:
    steps = plan.get("steps", 3)
    sets = [
        f"base.model={plan['checkpoint']}",
        f"data.prepared={plan['data']}",
        "data.chat_template=plain",
        "data.system_message=null",
        f"training.max_steps={steps}",
        "training.logging_steps=1",
        *plan.get("set", []),
    ]
    if "training.save_strategy='no'" not in sets:
        sets.append(f"training.save_steps={max(1, steps // 2)}")
    profile = ["--profile", plan["profile"]] if plan["profile"] else []
    command = [sys.executable, "cli.py", "train", plan["recipe"], *profile]
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
    held = {"FITUNE_GPU_CAP_GIB": str(plan["cap_gib"]), "PYTHONFAULTHANDLER": "1"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | plan.get("environment", {}) | held,
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


def kill_all(process: subprocess.Popen) -> None:
    """The command and all that it started; returns when they are gone, and page-locked memory with them."""
    if process.poll() is None:
        started = psutil.Process(process.pid).children(recursive=True)
        for one in (psutil.Process(process.pid), *started):
            with suppress(psutil.NoSuchProcess):  # it has just ended
                one.kill()
        psutil.wait_procs(started, timeout=30)
    process.wait()


def worst_rank(ranks: list[dict], watcher: Watcher) -> tuple[float, float]:
    """GiB on a GPU, all included, of the rank that takes most; how much of it lies outside torch's allocator."""
    if all(rank["pid"] in watcher.gpu_peak_of for rank in ranks):
        peak, reserved = max((watcher.gpu_peak_of[rank["pid"]], rank["peak_reserved_gib"]) for rank in ranks)
        return max(peak, reserved), max(0.0, peak - reserved)
    reserved = [rank["peak_reserved_gib"] for rank in ranks]
    outside = max(0.0, watcher.gpu_peak - sum(reserved)) / len(ranks)
    return max(reserved) + outside, outside


def _described(output: Path, plan: dict, watcher: Watcher) -> dict:
    import yaml

    run = yaml.safe_load((output / "run.yaml").read_text())
    measured = json.loads((output / "measurements.json").read_text())
    ranks = measured["ranks"]
    peak_gpu, outside = worst_rank(ranks, watcher)
    loading = [rank["loading"] for rank in ranks]
    return {
        "method": run["recipe"]["method"],
        "num_gpus": len(ranks),
        "machine_gpus": torch.cuda.device_count(),
        "offload": run["accelerate"]["offload_params"],
        "max_length": run["recipe"]["max_length"],
        "micro_batch": run["profile"]["micro_batch"],
        "replicas": run["profile"]["replicas"],
        "gradient_accumulation_steps": run["gradient_accumulation_steps"],
        "kept_layers": run["profile"]["kept_layers"],
        "kept_attention": run["profile"]["kept_attention"],
        "activation_offload": run["profile"]["activation_offload"],
        "async_save": run["profile"]["async_save"],
        "reduce_dtype": run["profile"]["reduce_dtype"],
        "layers": json.loads((Path(plan["checkpoint"]) / "config.json").read_text())["num_hidden_layers"],
        "peak_allocated_gib": round(measured["peak_allocated_gib"], 2),
        "peak_reserved_gib": round(measured["peak_reserved_gib"], 2),
        "outside_allocator_gib": round(outside, 2),
        "peak_gpu_gib": round(peak_gpu, 2),
        "peak_host_gib": round(watcher.host_peak, 2),
        "missed_gpu_samples": watcher.missed,
        "peak_host_rss_sum_gib": round(sum(rank["peak_host_rss_gib"] for rank in ranks), 2),
        "load_seconds": measured["load_seconds"],
        "load_read_gib": round(sum(rank["read_gib"] for rank in loading), 2),
        "load_peak_allocated_gib": round(max(rank["peak_allocated_gib"] for rank in loading), 2),
        "load_peak_host_rss_sum_gib": round(sum(rank["peak_host_rss_gib"] for rank in loading), 2),
        "step_seconds": measured["step_seconds"],
        "optimizer": measured["optimizer"],
        "gradients": measured["gradients"],
        "optimizer_seconds": measured["optimizer_seconds"],
        "tokens_per_second_per_gpu": round(measured["tokens_per_second_per_gpu"], 1),
        **_curves(_metrics(output)),
    }


def resume(plan: dict, work: Path) -> dict:
    """Runs what comes after the first checkpoint again, from it: both runs' losses and gradient norms."""
    output, command = output_folder(plan, work), train_command(plan, work)
    known = json.loads((output / AFTER_FIRST).read_text())
    code, tail = _call([*command, "--resume"], plan)
    if code:
        return {"ok": False, "error": tail[-800:], **known}
    after = _curves(_metrics(output), after=known["from_step"])
    shutil.rmtree(output)
    return {"ok": True, **known, "after": after}


def _metrics(output: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def _curves(lines: list[dict], after: int = 0) -> dict[str, list[float]]:
    lines = [line for line in lines if line["step"] > after]
    return {"losses": [line["loss"] for line in lines], "grad_norms": [line["grad_norm"] for line in lines]}


def torch_gib(card_gib: float) -> float:
    """What `plan` leaves torch's allocator of a card."""
    return round(card_gib - MEASURED.outside_allocator / GIB, 2)


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them, for one that a single run is to see; else their numbers."""
    named = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    return named or list(map(str, range(torch.cuda.device_count())))


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
