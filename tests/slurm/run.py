"""`make slurm-test`: jobs of `fitune submit --on slurm` on a real Slurm of two nodes, with what happens to jobs there.

A tiny model is trained by two ranks over gloo, one on each node: undisturbed; told to stop in the middle by `scancel
--signal=TERM`; and with either node killed in the middle. All are requeued, resumed, and end with the same adapter
bytes. A job whose set-up fails ends at once and is not requeued.
"""

import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from cluster import ENDED, Cluster, enter_namespace, missing

ROOT = Path(__file__).resolve().parents[2]
ADAPTER, STEPS = "adapter/adapter_model.safetensors", 30
PROFILE = """\
description: Two machines with a CPU process each.
accelerate_config: two_machines.accelerate.yaml
num_gpus: 0
host_memory_gib: 4
micro_batch: 2
kept_layers: 0
"""
ACCELERATE = """\
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
use_cpu: true
num_processes: 2
num_machines: 2
main_process_port: 29500
"""


def saved_steps(run: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in run.glob("checkpoints/checkpoint-*")]


class Jobs:
    """Runs in a folder, submitted to a cluster."""

    def __init__(self, folder: Path, cluster: Cluster):
        self.folder, self.cluster = folder, cluster
        (folder / "two_machines.yaml").write_text(PROFILE)
        (folder / "two_machines.accelerate.yaml").write_text(ACCELERATE)
        command = folder / "bin" / "fitune"
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(ROOT / "cli.py"))} "$@"\n')
        command.chmod(0o755)

    def submit(self, name: str, base: Path, prepared: Path, then: str = "") -> tuple[str, Path]:
        """(job number, run folder). `then` ends the set-up command."""
        run = self.folder / name
        sets = {
            "base.model": base, "data.prepared": prepared, "training.max_steps": STEPS, "training.save_steps": 1,
            "training.logging_steps": 1, "training.report_to": "none", "lora.r": 4,
        }  # fmt: skip
        flags = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
        profile, path = self.folder / "two_machines.yaml", self.folder / "bin"
        words = ["submit", "tiny_qlora", "--on", "slurm", "--nodes", "2", "--profile", str(profile), "--hours", "1"]
        words += ["--cpus", "1"]
        words += ["--setup", f"export PATH={path}:$PATH GLOO_SOCKET_IFNAME=lo{then}"]
        done = subprocess.run(
            [sys.executable, "cli.py", *words, "--output", str(run), *flags],
            cwd=ROOT, env=self.cluster.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-1], run

    def wait_for_step(self, job: str, run: Path, step: int) -> None:
        self.cluster.wait_for(
            lambda: (
                any(int(p.name.split("-")[1]) >= step for p in run.glob("checkpoints/checkpoint-*")) or self._over(job)
            ),
            f"{run.name} has saved step {step}",
        )
        assert not self._over(job), self.log(run)

    def finish(self, job: str, run: Path, state: str = "COMPLETED") -> dict[str, str]:
        """The job's fields once it is over, in that state."""
        self.cluster.wait_for(lambda: self._over(job), f"{run.name} is over")
        fields = self.cluster.job_state(job)
        assert fields["JobState"] == state, f"{fields}\n{self.log(run)}"
        return fields

    def adapter(self, job: str, run: Path) -> bytes:
        """Its bytes once the job is done."""
        self.finish(job, run)
        return (run / ADAPTER).read_bytes()

    def _over(self, job: str) -> bool:
        return self.cluster.job_state(job).get("JobState") in ENDED

    def log(self, run: Path) -> str:
        return Path(f"{run}-slurm.log").read_text()[-4000:]


def main() -> None:
    if reason := missing():
        sys.exit(reason)
    enter_namespace()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from conftest import build_base, write_split  # imports torch, which the first process needs not

    with tempfile.TemporaryDirectory(prefix="fitune-slurm-") as name:
        folder = Path(name)
        base = build_base(folder / "base", vocab_size=512, hidden_size=64, intermediate_size=192)
        prepared = folder / "data"
        prepared.mkdir()
        for split, count, seed in (("train", 48, 1), ("test", 8, 2)):
            write_split(prepared, split, count, seed)
        with Cluster(folder / "slurm") as cluster:
            try:
                jobs = Jobs(folder, cluster)
                _fail(jobs, base, prepared)
                _disturb(jobs, cluster, base, prepared)
            except AssertionError:
                for log in sorted((folder / "slurm").glob("*.log")):
                    print(f"--- {log.name}\n{log.read_text()[-3000:]}", file=sys.stderr)
                raise


def _fail(jobs: Jobs, base: Path, prepared: Path) -> None:
    job, run = jobs.submit("failed-set-up", base, prepared, then=" && source nowhere/activate")
    restarts = jobs.finish(job, run, "FAILED")["Restarts"]
    said = next(line for line in jobs.log(run).splitlines() if line.startswith("error: the set-up failed: "))
    assert restarts == "0" and not run.exists(), jobs.log(run)
    print(f"set-up that fails: job {job} ended, not requeued: {said[:24]}")


def _disturb(jobs: Jobs, cluster: Cluster, base: Path, prepared: Path) -> None:
    job, run = jobs.submit("undisturbed", base, prepared)
    expected = jobs.adapter(job, run)
    print(f"undisturbed: job {job} trained {STEPS} steps on {cluster.job_state(job)['NodeList']}")

    job, run = jobs.submit("told-to-stop", base, prepared)
    jobs.wait_for_step(job, run, 3)
    cluster.command("scancel", "--signal=TERM", job)
    cluster.begin_now(job)
    found = jobs.adapter(job, run)
    _check(
        "told to stop by scancel --signal=TERM", jobs, job, run, found == expected, "stopped: interrupted after step"
    )

    for node in ("n2", "n1"):  # n1 also runs the job's script, and rank 0
        job, run = jobs.submit(f"lost-{node}", base, prepared)
        jobs.wait_for_step(job, run, 3)
        cluster.kill_node(node)
        cluster.wait_for_restart(job)
        cluster.start_node(node)
        found = jobs.adapter(job, run)
        _check(f"{node} killed", jobs, job, run, found == expected, "goes on after step")


def _check(what: str, jobs: Jobs, job: str, run: Path, same: bool, said: str) -> None:
    restarts, log = jobs.cluster.job_state(job)["Restarts"], Path(f"{run}-slurm.log").read_text()
    assert restarts == "1" and said in log, f"{what}: {restarts} restarts\n{log[-4000:]}"
    assert same, f"{what}: another adapter than undisturbed"
    resumed = next(line for line in log.splitlines() if "goes on after step" in line)
    print(f"{what}: job {job} was requeued and {resumed.partition(': ')[2]}; the same adapter bytes")


if __name__ == "__main__":
    main()
