"""How soon the light commands answer: `python benchmarks/startup.py`, the fastest of five tries of each, in seconds."""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("--help", "list", "show tiny_qlora --profile cpu_2proc", "plan llama3_70b_qlora --profile fsdp_4x24gb",
            "plan llama3_70b_qlora --all")  # fmt: skip


def seconds(command: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "cli.py", *command.split()], cwd=ROOT, capture_output=True, check=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    for command in COMMANDS:
        print(f"{min(seconds(command) for _ in range(5)):5.2f}  {command}")
