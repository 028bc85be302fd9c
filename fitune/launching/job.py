"""A run as a job of someone else's scheduler: what every job file says, whatever its language.

A job prepares its rows once, trains with each machine's place among the others, and goes on by `--resume` when it is
started again: exit code 75 says that it was interrupted and saved.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from fitune.errors import INTERRUPTED

PORT = 29500
SAVE_SECONDS = 600
"Between the signal that a job must end and its end: a step and a checkpoint."
OTHERS_SECONDS = 120
"""After the first node of a Slurm job has ended, for the others to end: each writes what it has. With srun's
--kill-on-bad-exit the first one that is interrupted would have the others ended as they save."""
TOKEN = "HF_TOKEN"
"The environment variable with a token of Hugging Face, for gated models."
MOUNT = "/outputs"
"Where a SkyPilot task sees its bucket."


@dataclass(frozen=True)
class Job:
    """What is to be trained and on what."""

    name: str
    recipe: str
    "As typed: a shipped name, or the path of a file."
    profile: str | None
    sets: tuple[str, ...]
    nodes: int
    gpus: int
    "Of each node; 0 for the CPU."
    output: str
    "The run's folder, which all nodes must see."
    prepared: str
    "The folder of prepared rows."
    hours: float
    "The longest time of one start."
    cpus: int | None
    "Cores of each node; None: as many as the scheduler gives."
    memory: int | None
    "RAM of each node in GiB; None: as much as the scheduler gives."
    setup: str = ""
    "A command that puts `fitune` in PATH, such as `source .venv/bin/activate`."
    gpu: str | None = None
    "The GPU model, where the scheduler is asked for one."
    image: str | None = None
    "A container image with fitune."
    bucket: str | None = None
    "SkyPilot's storage that outlives machines."
    partition: str | None = None
    "Slurm's."

    @property
    def minutes(self) -> int:
        return round(self.hours * 60)

    @property
    def save_seconds(self) -> int:
        """At the end of its time, to save in. Half of a short one: else it would be told to end as it starts."""
        return min(SAVE_SECONDS, self.minutes * 60 // 2)

    @property
    def prepare(self) -> str:
        """One shell line that prepares the rows unless they are there."""
        words = ["fitune", "prepare", self.recipe, *_flags(s for s in self.sets if not s.startswith("profile."))]
        return f"[ -f {shlex.quote(self.prepared)}/train.jsonl ] || {shlex.join(words)}"

    @property
    def set_up(self) -> list[str]:
        """Shell lines that end the job, and say why in its log, unless `fitune` can be called after them."""
        failed, missing = f"the set-up failed: {self.setup}", "no command fitune here: --setup puts it in PATH"
        lines = ["{", self.setup, f"}} || {_end(failed)}"] if self.setup else []
        return [*lines, f"command -v fitune > /dev/null || {_end(missing)}"]

    def arguments(self, output: str) -> list[str]:
        """Shell lines that set $@ to what `fitune train` is given: the run, or where it was begun, its folder."""
        begin = [self.recipe, *(["--profile", self.profile] if self.profile else []), *_flags(self.sets)]
        begin += ["--machines", str(self.nodes)] if self.nodes > 1 and not self.profile else []
        folder = shlex.quote(output)
        return [
            f"if [ -f {folder}/run.yaml ]; then set -- --resume {folder}",
            f"else set -- {shlex.join(begin)} --output {folder}; fi",
        ]

    def place(self, rank: str, head: str, port: str = str(PORT)) -> str:
        """The flags of one machine among several, from shell variables; nothing where there is one."""
        if self.nodes == 1:
            return ""
        return f' --machine-rank "{rank}" --main-process-ip "{head}" --main-process-port {port}'


def _flags(sets) -> list[str]:
    return [part for text in sets for part in ("--set", text)]


def _end(said: str) -> str:
    """A shell command: one line of what went wrong in the job's log, and code 1."""
    return f"{{ echo {shlex.quote(f'error: {said}')} >&2; exit 1; }}"


def _log_file(output: str) -> str:
    """As an #SBATCH line gives it: Slurm parts words at spaces there, and replaces %j and the like."""
    return shlex.quote(f"{output}-slurm.log".replace("%", "%%"))


def sbatch_script(job: Job) -> str:
    """A Slurm job. Preempted, out of time or told so by `scancel --signal=TERM`, it saves and is requeued."""
    options = {
        "job-name": job.name, "nodes": job.nodes, "ntasks-per-node": 1, "gpus-per-node": job.gpus or None,
        "cpus-per-task": job.cpus, "mem": job.memory and f"{job.memory}G",
        "partition": job.partition, "time": f"{job.minutes // 60}:{job.minutes % 60:02d}:00",
        "signal": f"TERM@{job.save_seconds}", "output": _log_file(job.output), "open-mode": "append",
    }  # fmt: skip
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None),
        "#SBATCH --requeue",
        "",
        f"cd {shlex.quote(str(Path.cwd()))} || {_end('this node does not see the folder of the job')}",
        *job.set_up,
        f"{{ {job.prepare}; }} || exit",
        *job.arguments(job.output),
        "",
    ]
    if job.nodes > 1:
        lines += [
            "# machine 0 is the first node; jobs that share it have ports of their own",
            'export HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "export PORT=$((20000 + SLURM_JOB_ID % 10000))",
        ]
    cores = f" --cpus-per-task={job.cpus}" if job.cpus else ""  # srun does not take it from the job, since 22.05
    command = f'exec fitune train "$@"{job.place("$SLURM_NODEID", "$HEAD", "$PORT")}'
    lines += [
        f"srun --wait={OTHERS_SECONDS}{cores} bash -c '{command}' fitune \"$@\"",
        "code=$?",
        f"# {INTERRUPTED}: told to stop, and saved. Slurm starts the job again, which then goes on",
        f'{_was_interrupted(job)} && scontrol requeue "$SLURM_JOB_ID"',
        "exit $code",
    ]
    return "\n".join(lines) + "\n"


def _was_interrupted(job: Job) -> str:
    """A shell test of $code. A node that was told to stop because another one failed says so too, but not alone."""
    if job.nodes == 1:
        return f"[ $code -eq {INTERRUPTED} ]"
    return f"[ $code -eq {INTERRUPTED} ] && ! compgen -G {shlex.quote(job.output)}/machines/*.failed > /dev/null"


def skypilot_task(job: Job) -> dict:
    """A SkyPilot task: `sky jobs launch` starts it, and starts it again after a preemption.

    Each node prepares the rows on its own disk: they come out the same, and are compared before the first step.
    """
    output = f"{MOUNT}/{Path(job.output).name}"
    head = '$(echo "$SKYPILOT_NODE_IPS" | head -n 1)'
    place = job.place("$SKYPILOT_NODE_RANK", head)
    lines = ["set -e", *job.set_up, job.prepare, *job.arguments(output), f'fitune train "$@"{place}']
    resources = {
        **({"accelerators": f"{name_in_catalogue(job.gpu)}:{job.gpus}"} if job.gpus else {}),
        **({"cpus": f"{job.cpus}+"} if job.cpus else {}),
        **({"memory": f"{job.memory}+"} if job.memory else {}),
        **({"image_id": f"docker:{job.image}"} if job.image else {}),
        "use_spot": True,
        "job_recovery": {"max_restarts_on_errors": 3, "recover_on_exit_codes": [INTERRUPTED]},
    }
    return {
        "name": job.name,
        "num_nodes": job.nodes,
        "workdir": ".",
        "resources": resources,
        "file_mounts": {MOUNT: {"source": job.bucket, "mode": "MOUNT"}},
        "secrets": {TOKEN: ""},
        "setup": job.setup or 'pip install ".[gpu]"',
        "run": "\n".join(lines) + "\n",
    }


def name_in_catalogue(gpu: str) -> str:
    """A GPU as SkyPilot's catalogue names it: RTX4090, RTXA6000, RTX6000-Ada, A100-80GB; SkyPilot ignores the case."""
    name = re.sub(r"(?i)\b(nvidia|geforce|quadro|tesla|generation)\b", "", gpu).strip()
    name = re.sub(r"(?i)\b(RTX)[ -]?(PRO|A)?[ -]?(?=\d)", r"\1\2", name)
    return re.sub(r"[ -]+", "-", name)


def kubernetes_jobset(job: Job) -> dict:
    """A JobSet of one indexed job, a pod on each node. Exit code 75 starts it again and counts as no failure."""
    place = job.place("$JOB_COMPLETION_INDEX", f"{job.name}-nodes-0-0.{job.name}")
    prepare = f"flock {shlex.quote(job.prepared.rstrip('/') + '.lock')} bash -c {shlex.quote(job.prepare)}"
    lines = ["set -e", *job.set_up, f"mkdir -p {shlex.quote(str(Path(job.prepared).parent))}"]
    lines += [prepare, *job.arguments(job.output), f'exec fitune train "$@"{place}']
    requests = {**({"cpu": job.cpus} if job.cpus else {}), **({"memory": f"{job.memory}Gi"} if job.memory else {})}
    limits = {"nvidia.com/gpu": job.gpus} if job.gpus else {}
    resources = {**({"requests": requests} if requests else {}), **({"limits": limits} if limits else {})}
    token = {"secretKeyRef": {"name": "hf-token", "key": "token", "optional": True}}
    container = {
        "name": "fitune",
        "image": job.image,
        "command": ["bash", "-c", "\n".join(lines) + "\n"],
        "workingDir": "/data",
        "env": [{"name": TOKEN, "valueFrom": token}],
        **({"resources": resources} if resources else {}),
        "volumeMounts": [{"name": "data", "mountPath": "/data"}, {"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": SAVE_SECONDS,
        "containers": [container],
        "volumes": [
            {"name": "data", "persistentVolumeClaim": {"claimName": "fitune-data"}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
    exit_codes = {"containerName": "fitune", "operator": "In", "values": [INTERRUPTED]}
    evicted = [{"type": "DisruptionTarget", "status": "True"}]
    template = {
        "parallelism": job.nodes,
        "completions": job.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "activeDeadlineSeconds": round(job.hours * 3600),
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": exit_codes},
                {"action": "FailJob", "onPodConditions": evicted},
            ]
        },
        "template": {"spec": pod},
    }
    again = {
        "name": "interrupted",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy", "DeadlineExceeded"],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": job.name},
        "spec": {
            "failurePolicy": {"maxRestarts": 3, "rules": [again]},
            "replicatedJobs": [{"name": "nodes", "replicas": 1, "template": {"spec": template}}],
        },
    }
