"""`fitune submit`: writes the job file of a scheduler and hands it over. No scheduler of our own."""

import math
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from fitune.config import run as runs
from fitune.config.shipped import name_of
from fitune.errors import FituneError, UsageError
from fitune.launching.job import Job, kubernetes_jobset, sbatch_script, skypilot_task
from fitune.planning.fill import resolve
from fitune.planning.limits import limits_of
from fitune.planning.plan import make_plan
from fitune.planning.sizes import GIB

CORES_OF_A_GPU = 2
"One for its rank's Python, one for what loads, saves and prepares. Slurm gives a job one core unless it is asked."
LEAST_MEMORY = 8
"GiB: `prepare` and a few processes."
MEMORY_ROOM = 1.2


@dataclass(frozen=True)
class Scheduler:
    """How a job is written and handed over."""

    write: Callable[[Job], str | dict]
    "A script, or what is written as YAML."
    ending: str
    command: tuple[str, ...]
    "What takes the file, which follows."
    needs: dict[str, str]
    "Flags without which the job cannot be written, and what each is."


SCHEDULERS = {
    "slurm": Scheduler(sbatch_script, ".sbatch", ("sbatch",), {}),
    "skypilot": Scheduler(
        skypilot_task, ".sky.yaml", ("sky", "jobs", "launch", "--yes"),
        {"gpu": "the GPU model to ask for, such as H100", "bucket": "storage for checkpoints, such as s3://mine"},
    ),
    "kubernetes": Scheduler(
        kubernetes_jobset, ".jobset.yaml", ("kubectl", "apply", "-f"), {"image": "a container image with fitune"},
    ),
}  # fmt: skip


class _Yaml(yaml.SafeDumper):
    """Writes texts of several lines as they are read."""


_Yaml.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def submit(
    recipe: str, profile: str | None, sets: tuple[str, ...], output: str | None, *, scheduler: str, nodes: int,
    gpus: int | None, dry_run: bool, **options,
) -> tuple[Path, str]:  # fmt: skip
    """Writes the job file beside the run's folder and hands it over; (the file, what the scheduler answered).

    With `dry_run` nothing is handed over. `options` are fields of `Job`. Raises UsageError, or FituneError if the
    scheduler refuses.
    """
    engine = SCHEDULERS[scheduler]
    job = _job(recipe, profile, sets, output, nodes, gpus, options)
    for flag, meaning in engine.needs.items():
        if getattr(job, flag) is None and not (flag == "gpu" and not job.gpus):
            raise UsageError(f"--on {scheduler} needs --{flag}: {meaning}")
    if not dry_run and shutil.which(engine.command[0]) is None:
        raise UsageError(f"{engine.command[0]}: no such command here; --dry-run writes the job file only")
    written = engine.write(job)
    text = written if isinstance(written, str) else yaml.dump(written, Dumper=_Yaml, sort_keys=False, width=1000)
    file = Path(f"{job.output}{engine.ending}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file, "" if dry_run else _hand_over(engine, file)


def _job(
    recipe: str, profile: str | None, sets: tuple[str, ...], output: str | None, nodes: int, gpus: int | None,
    options: dict,
) -> Job:  # fmt: skip
    """Raises UsageError for a run that cannot be, or whose machines are not as many as the nodes."""
    loaded, stem = runs.load_recipe(recipe, runs.parse_sets(sets)[0]), name_of(recipe)
    hardware = name_of(profile) if profile else f"{nodes}x{gpus}gpu"
    if profile:
        accelerate = runs.resolve(recipe, profile, sets, output).accelerate
        if accelerate.num_machines != nodes:
            raise UsageError(
                f"--nodes {nodes}: {accelerate.path} has num_machines {accelerate.num_machines}; make them equal"
            )
        gpus = 0 if accelerate.use_cpu else accelerate.num_processes // nodes
    elif gpus is None:
        raise UsageError("give --gpus, the GPUs of each node, or a --profile that says so")
    options |= {"cpus": options["cpus"] or CORES_OF_A_GPU * gpus or None}
    options |= {"memory": options["memory"] or _needed_memory(recipe, profile, sets)}
    name = re.sub(r"[^a-z0-9]+", "-", f"fitune-{stem}".lower()).strip("-")
    folder = output or f"runs/{stem}-{hardware}"
    return Job(name, recipe, profile, sets, nodes, gpus, folder, loaded.data.prepared, **options)


def _needed_memory(recipe: str, profile: str | None, sets: tuple[str, ...]) -> int | None:
    """GiB of RAM of a node, with room for what the prediction may be off; None where `plan` cannot say."""
    if not profile:
        return None  # what is kept in RAM is decided on the nodes
    with suppress(UsageError):  # a model whose sizes are not known here
        run = resolve(recipe, profile, sets)
        plan = make_plan(run, limits_of(run))
        return max(LEAST_MEMORY, math.ceil(MEMORY_ROOM * sum(plan.host[plan.host_phase].values()) / GIB))
    return None


def _hand_over(engine: Scheduler, file: Path) -> str:
    done = subprocess.run([*engine.command, str(file)], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise FituneError(f"{engine.command[0]} refused {file}: {said[-1] if said else 'without a word'}")
    return done.stdout.strip()
