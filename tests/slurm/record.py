"""What `make slurm-test` leaves of a run: one JSON with each job, and what Slurm and the job itself said of it."""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

from cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
FIELDS = ("JobState", "ExitCode", "Restarts", "NodeList", "NumNodes", "BatchHost", "SubmitTime", "EndTime")
"Of `scontrol show job`."


class Record:
    """Cases as they happen; `write` makes the file of them."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder, self.cases, self.began = cluster, folder, [], time.monotonic()
        self.commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()

    def add(self, what: str, job: str, run: Path, adapter: bytes | None = None, **outcome) -> dict:
        """One job that is over; `adapter` is its result, `outcome` what a case knows besides."""
        state = self.cluster.job_state(job)
        case = {
            "case": what,
            "job": int(job),
            **{field: state[field] for field in FIELDS if field in state},
            **outcome,
            "checkpoints_left": sorted(int(path.name.split("-")[1]) for path in run.glob("checkpoints/checkpoint-*")),
            "adapter_sha256": None if adapter is None else hashlib.sha256(adapter).hexdigest(),
            "controller_log": [self._plain(line) for line in _about_job(self._controller_log(), job)],
            "job_log": [self._plain(line) for line in _read(Path(f"{run}-slurm.log"))],
        }
        self.cases.append(case)
        return case

    def write(self, output: Path, error: str | None = None) -> Path:
        """The record in the folder `output`; with an `error`, one of a run that failed."""
        from tier_run import about  # torch, which the first process needs not

        report = {
            "benchmark": "jobs on a real Slurm: told to stop, nodes killed, requeued, resumed",
            "ok": error is None,
            **({"error": self._plain(error)} if error else {}),
            "seconds": round(time.monotonic() - self.began, 1),
            "command": " ".join(["python", *sys.argv]),
            "hardware": {
                "cpu": _cpu(), "cores": os.cpu_count(),
                "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            },
            "slurm": self.cluster.command("slurmctld", "-V").strip(),
            "system": platform.freedesktop_os_release()["PRETTY_NAME"],
            "python": platform.python_version(),
            **about(self.commit or "unknown"),
            "cases": self.cases,
        }  # fmt: skip
        output.mkdir(parents=True, exist_ok=True)
        file = output / f"{'failed-' if error else ''}slurm-{report['date']}.json"
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        return file

    def _controller_log(self) -> list[str]:
        return _read(self.folder / "slurmctld.log")

    def _plain(self, text: str) -> str:
        """Without the folder's own path, which is gone when the run is over."""
        return text.replace(str(self.folder.parent), "FOLDER").replace(str(ROOT), "FITUNE")


def _about_job(lines: list[str], job: str) -> list[str]:
    return [line for line in lines if re.search(rf"JobId={job}\b", line)]


def _read(file: Path) -> list[str]:
    """Its lines as a terminal would leave them: what a progress bar wrote over is gone."""
    if not file.is_file():
        return []
    lines = file.read_bytes().decode(errors="replace").split("\n")
    return [line.rstrip("\r").rpartition("\r")[2] for line in lines if line.strip()]


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
