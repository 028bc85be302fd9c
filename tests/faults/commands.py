"""Real `cli.py train` commands for fault injection: a tiny run of two ranks, its ranks' pids, its results."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
ADAPTER = "adapter/adapter_model.safetensors"


def train_command(base: Path, prepared: Path, output: Path, steps: int, **sets) -> list[str]:
    """A run that saves after each step."""
    sets = {
        "base.model": base, "data.prepared": prepared, "training.max_steps": steps, "training.save_steps": 1,
        "training.logging_steps": 1, "training.report_to": "none", "lora.r": 4, **sets,
    }  # fmt: skip
    flags = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    return [sys.executable, "cli.py", "train", "tiny_qlora", "--profile", "cpu_2proc", "--output", str(output), *flags]


class Running:
    """A started command; what it prints is in `log`."""

    def __init__(self, command: list[str], log: Path, **environment: str):
        self.log = log
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self, timeout: float = 120) -> int:
        return self.process.wait(timeout)

    def ranks(self) -> dict[int, psutil.Process]:
        """The ranks that are alive, by number."""
        found = {}
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children():
                with suppress(psutil.Error):  # it may be gone by now
                    if "fitune.training.train" in child.cmdline():
                        found[int(child.environ()["RANK"])] = child
        return found

    def wait_for(self, condition, timeout: float = 90) -> None:
        """Until `condition()` holds; fails with the log if the command ends before."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.01)


def start_on_two_machines(command: list[str], folder: Path, **environment: str) -> list[Running]:
    """Two launchers with one rank each, as on two machines that share a folder; their logs are in `folder`."""
    accelerate = folder / "two_machines.yaml"
    text = (ROOT / "accelerate_configs/cpu_2proc.yaml").read_text()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = text.replace("main_process_port: 0", f"main_process_port: {port}")
    accelerate.write_text(text + "num_machines: 2\nmachine_rank: 0\nmain_process_ip: 127.0.0.1\n")
    command = [*command, "--set", f"profile.accelerate_config={accelerate}"]
    return [Running([*command, "--machine-rank", str(n)], folder / f"log-{n}", **environment) for n in (1, 0)]


def losses(folder: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (folder / "checkpoints").glob("checkpoint-*"))
