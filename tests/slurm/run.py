"""`make slurm-test`: jobs of `fitune submit --on slurm` on a real Slurm of two nodes, with what happens to jobs there.

A tiny model is trained by two ranks over gloo, one on each node: undisturbed; told to stop in the middle by `scancel
--signal=TERM`; and with either node killed in the middle. All are requeued, resumed, and end with the same adapter
bytes. A job whose set-up fails ends at once and is not requeued. What happened is written to a JSON (`record.py`).
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from cluster import ENDED, Cluster, enter_namespace, missing
from record import Record

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
            lambda: any(saved >= step for saved in saved_steps(run)) or self._over(job),
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "runs", help="the folder of the record")
    output = parser.parse_args().output.absolute()
    if reason := missing():
        sys.exit(reason)
    enter_namespace()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
    from conftest import build_base, write_split  # imports torch, which the first process needs not

    with tempfile.TemporaryDirectory(prefix="fitune-slurm-") as name:
        folder = Path(name)
        base = build_base(folder / "base", vocab_size=512, hidden_size=64, intermediate_size=192)
        prepared = folder / "data"
        prepared.mkdir()
        for split, count, seed in (("train", 48, 1), ("test", 8, 2)):
            write_split(prepared, split, count, seed)
        with Cluster(folder / "slurm") as cluster:
            record = Record(cluster, folder / "slurm")
            try:
                jobs = Jobs(folder, cluster)
                _fail(jobs, record, base, prepared)
                _disturb(jobs, record, base, prepared)
            except AssertionError as error:
                print(f"record: {record.write(output, str(error))}", file=sys.stderr)
                for log in sorted((folder / "slurm").glob("*.log")):
                    print(f"--- {log.name}\n{log.read_text()[-3000:]}", file=sys.stderr)
                raise
            print(f"record: {record.write(output)}")


def _fail(jobs: Jobs, record: Record, base: Path, prepared: Path) -> None:
    job, run = jobs.submit("failed-set-up", base, prepared, then=" && source nowhere/activate")
    restarts = jobs.finish(job, run, "FAILED")["Restarts"]
    said = next(line for line in jobs.log(run).splitlines() if line.startswith("error: the set-up failed: "))
    assert restarts == "0" and not run.exists(), jobs.log(run)
    what = "set-up that fails"
    record.add(what, job, run)
    print(f"{what}: job {job} ended, not requeued: {said[:24]}")


def _disturb(jobs: Jobs, record: Record, base: Path, prepared: Path) -> None:
    cluster = jobs.cluster
    job, run = jobs.submit("undisturbed", base, prepared)
    expected = jobs.adapter(job, run)
    case = record.add("undisturbed", job, run, expected, steps=STEPS)
    print(f"undisturbed: job {job} trained {STEPS} steps on {case['NodeList']}")

    def check(what: str, after: int, log_says: str) -> None:
        """Ends the case: requeued once, resumed, and the same bytes as undisturbed."""
        found = jobs.adapter(job, run)
        log = Path(f"{run}-slurm.log").read_text()
        resumed = next((line for line in log.splitlines() if "goes on after step" in line), "").partition(": ")[2]
        same = found == expected
        case = record.add(
            what, job, run, found, steps=STEPS, disturbed_after_step=after, resumed=resumed, same_adapter_bytes=same
        )
        assert case["Restarts"] == "1" and log_says in log, f"{what}: {case['Restarts']} restarts\n{log[-4000:]}"
        assert same, f"{what}: another adapter than undisturbed"
        print(f"{what}: job {job} was requeued and {resumed}; the same adapter bytes")

    job, run = jobs.submit("told-to-stop", base, prepared)
    jobs.wait_for_step(job, run, 3)
    after = max(saved_steps(run))
    cluster.command("scancel", "--signal=TERM", job)
    cluster.begin_now(job)
    check("told to stop by scancel --signal=TERM", after, "stopped: interrupted after step")

    for node in ("n2", "n1"):  # n1 also runs the job's script, and rank 0
        job, run = jobs.submit(f"lost-{node}", base, prepared)
        jobs.wait_for_step(job, run, 3)
        after = max(saved_steps(run))
        cluster.kill_node(node)
        cluster.wait_for_restart(job)
        cluster.start_node(node)
        check(f"{node} killed", after, "goes on after step")


if __name__ == "__main__":
    main()
