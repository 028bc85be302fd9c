"""`fitune submit`: writes the job file of a scheduler and hands it over. No scheduler of our own."""

import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from fitune.config import run as runs
from fitune.config.recipe import Recipe
from fitune.config.recipe_paths import absolute_paths
from fitune.config.schema import AccelerateConfig
from fitune.config.shipped import name_of
from fitune.errors import FituneError, UsageError
from fitune.launching.job import TOKEN, Job, kubernetes_jobset, sbatch_script, skypilot_task
from fitune.launching.run_folder import SETTINGS
from fitune.planning.compute import has_fp8, lack_of_fp8
from fitune.planning.fill import resolve
from fitune.planning.gpu_models import look_up, refuse_several
from fitune.planning.limits import limits_of
from fitune.planning.machine import Gpu, Machine
from fitune.planning.plan import make_plan
from fitune.planning.sizes import GIB

HOURS = 24
CORES_OF_A_GPU = 2
"One for its rank's Python, one for what loads, saves and prepares. Slurm gives a job one core unless it is asked."
LEAST_MEMORY = 8
"GiB: `prepare` and a few processes."
MEMORY_ROOM = 1.2
LONGEST_NAME = 50
"Letters. Kubernetes makes names of pods from a JobSet's, and lets them have 63."


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
    takes: tuple[str, ...] = ()
    "Further flags that not every scheduler has a use for."
    with_token: tuple[str, ...] = ()
    "Words of the command that give the job the token in this environment, where there is one."


SCHEDULERS = {
    "slurm": Scheduler(sbatch_script, ".sbatch", ("sbatch",), {}, ("hours", "partition")),
    "skypilot": Scheduler(
        skypilot_task, ".sky.yaml", ("sky", "jobs", "launch", "--yes"),
        {"gpu": "the GPU model to ask for, such as H100", "bucket": "storage for checkpoints, such as s3://mine"},
        ("image",), ("--secret", TOKEN),
    ),
    "kubernetes": Scheduler(
        kubernetes_jobset, ".jobset.yaml", ("kubectl", "apply", "-f"), {"image": "a container image with fitune"},
        ("hours",),
    ),
}  # fmt: skip


class _Yaml(yaml.SafeDumper):
    """Writes texts of several lines as they are read."""


_Yaml.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def submit(
    recipe: str, profile: str | None, sets: tuple[str, ...], output: str | None, *, scheduler: str,
    nodes: int | None, gpus: int | None, dry_run: bool, **options,
) -> tuple[Path, str]:  # fmt: skip
    """Writes the job file beside the run's folder and hands it over; (the file, what the scheduler answered).

    With `dry_run` nothing is handed over. `options` are fields of `Job`. Raises UsageError, or FituneError if the
    scheduler refuses.
    """
    engine = SCHEDULERS[scheduler]
    _refuse_ignored_flags(scheduler, options)
    job = _job(recipe, profile, sets, output, nodes, gpus, options)
    for flag, meaning in engine.needs.items():
        if getattr(job, flag) is None and not (flag == "gpu" and not job.gpus):
            raise UsageError(f"--on {scheduler} needs --{flag}: {meaning}")
    if job.gpu:
        _refuse_gpu(job)
    if scheduler == "kubernetes" and Path(job.output).is_absolute():
        raise UsageError(
            f"--output {job.output}: a pod keeps what lies on its volume, /data; give a path below it, as runs/first"
        )
    if not dry_run and shutil.which(engine.command[0]) is None:
        raise UsageError(f"{engine.command[0]}: no such command here; --dry-run writes the job file only")
    written = engine.write(job)
    text = written if isinstance(written, str) else yaml.dump(written, Dumper=_Yaml, sort_keys=False, width=1000)
    file = Path(f"{job.output}{engine.ending}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file, "" if dry_run else _hand_over(engine, file)


def _refuse_ignored_flags(scheduler: str, given: dict) -> None:
    """UsageError for a flag that this scheduler's job file has no place for."""
    takes = {name: {*engine.needs, *engine.takes} for name, engine in SCHEDULERS.items()}
    for flag in sorted(set().union(*takes.values()) - takes[scheduler]):
        if given[flag] is not None:
            others = " and ".join(name for name, flags in takes.items() if flag in flags)
            raise UsageError(f"--{flag} is for {others}: leave it out with --on {scheduler}")


def _job(
    recipe: str, profile: str | None, sets: tuple[str, ...], output: str | None, nodes: int | None,
    gpus: int | None, options: dict,
) -> Job:  # fmt: skip
    """Raises UsageError for a run that cannot be."""
    loaded, stem = runs.load_recipe(recipe, runs.parse_sets(sets)[0]), name_of(recipe)
    if profile:
        nodes, gpus = _nodes_of_profile(runs.resolve(recipe, profile, sets, output).accelerate, nodes, gpus)
    elif gpus is None:
        raise UsageError("give --gpus, the GPUs of each node, or a --profile that says so")
    nodes = nodes or 1
    hardware = name_of(profile) if profile else f"{nodes}x{gpus}gpu"
    options |= {"cpus": options["cpus"] or CORES_OF_A_GPU * gpus or None}
    options |= {"hours": options["hours"] or HOURS}
    options |= {"memory": options["memory"] or _needed_memory(recipe, profile, sets)}
    folder = output or f"runs/{stem}-{hardware}"
    _refuse_a_folder_of_other_settings(Path(folder), loaded)
    return Job(_name(folder), recipe, profile, sets, nodes, gpus, folder, loaded.data.prepared, **options)


def _refuse_a_folder_of_other_settings(folder: Path, recipe: Recipe) -> None:
    """UsageError where the job would go on with a run that is there, as that was begun."""
    if (folder / SETTINGS).is_file():
        old, new = (absolute_paths(one.model_dump()) for one in (runs.load(folder).recipe, recipe))
        if changed := [key for key in new if old.get(key) != new[key]]:
            raise UsageError(
                f"{folder} holds a run with other settings ({', '.join(changed)}), and the job would go on with that: "
                f"give another --output"
            )


def _refuse_gpu(job: Job) -> None:
    """UsageError for a GPU to ask for that cannot compute as the run does; one that is not known is left to the job."""
    model, colon, count = job.gpu.partition(":")
    if colon:
        raise UsageError(f"--gpu {job.gpu}: give the model alone, --gpu '{model}' --gpus {count}")
    refuse_several(job.gpu)
    if not job.gpus:
        raise UsageError(f"--gpu {job.gpu}: the profile trains on the CPU; leave out --gpu")
    if (model := look_up(job.gpu)) is None:
        return
    Machine((Gpu(job.gpu, 0, 0),), 0, 0).refuse_missing_bf16()
    if job.profile:
        compute = runs.resolve(job.recipe, job.profile, job.sets).profile.compute
    else:
        compute = runs.parse_sets(job.sets)[1].get("compute")
    if compute == "fp8" and not has_fp8(model):
        raise UsageError(
            f"--gpu {job.gpu}: {lack_of_fp8(model)}; ask for one that has it, such as L4, L40S or H100, or use --set "
            f"profile.compute=bf16"
        )


def _nodes_of_profile(accelerate: AccelerateConfig, nodes: int | None, gpus: int | None) -> tuple[int, int]:
    """(machines, GPUs of each), as the profile's processes need them. UsageError where other numbers were given."""
    machines = accelerate.num_machines
    each = 0 if accelerate.use_cpu else accelerate.num_processes // machines
    if nodes not in (None, machines):
        raise UsageError(f"--nodes {nodes}: {accelerate.path} has num_machines {machines}; make them equal")
    if gpus not in (None, each):
        raise UsageError(f"--gpus {gpus}: the profile takes {each} on each node; leave out --gpus, or --profile")
    return machines, each


def _name(folder: str) -> str:
    """The run's name in the scheduler's lists: its folder's, in the letters that Kubernetes allows."""
    return re.sub(r"[^a-z0-9]+", "-", f"fitune-{Path(folder).name}".lower())[:LONGEST_NAME].strip("-")


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
    token = engine.with_token if os.environ.get(TOKEN) else ()
    done = subprocess.run([*engine.command, *token, str(file)], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise FituneError(f"{engine.command[0]} refused {file}: {said[-1] if said else 'without a word'}")
    return done.stdout.strip()
