"""What can be checked before a process is started."""

import sys
from pathlib import Path

from fitune.columns import short
from fitune.config.base_model import check_base_model
from fitune.config.command_name import command
from fitune.config.evaluation import is_evaluated
from fitune.config.hub import local_config, local_folder
from fitune.config.schema import Run
from fitune.config.shipped import RECIPES, names
from fitune.errors import UsageError
from fitune.launching.disk_speed import slow_to_save
from fitune.launching.shared_memory import short_of_shared_memory


def check_before_training(run: Run, *, force: bool = False) -> None:
    """Raises UsageError for what would fail minutes later: missing data, unreachable base model, too little memory."""
    for split in ("train", "test"):
        file = Path(run.recipe.data.prepared) / f"{split}.jsonl"
        if not file.is_file():
            raise UsageError(f"{file}: no such file; run: {_preparing(run)}")
    if is_evaluated(run.recipe.training) and not (Path(run.recipe.data.prepared) / "test.jsonl").stat().st_size:
        raise UsageError(
            f"{run.recipe.data.prepared}/test.jsonl has no rows, and training.eval_strategy asks for evaluations; "
            f"prepare held-out rows (data.test_split or data.test_fraction), or set training.eval_strategy=no"
        )
    check_base_model(local_config(run.recipe.base.model, run.recipe.base.revision), run.recipe)
    if Path(run.recipe.base.model).is_dir():
        fetch_base(run)  # there is nothing to fetch, but weights may be missing
    _check_gpus(run)
    if not force:
        check_fits(run)
    if slow := slow_to_save(run):
        print(f"note: {slow}", file=sys.stderr)


def _preparing(run: Run) -> str:
    """The command that puts rows where the run looks for them. A run keeps the name of its recipe, not a path to it."""
    folder, recipe = run.recipe.data.prepared, run.recipe_name if run.recipe_name in names(RECIPES) else "RECIPE"
    return command("prepare", recipe, "--output", short(folder), *(["--overwrite"] if Path(folder).exists() else []))


def refuse_gpus_without_bf16(run: Run) -> None:
    """Raises UsageError if a GPU that the run takes here cannot compute in bf16."""
    from fitune.planning.hardware import this_machine
    from fitune.planning.limits import machine_of

    if not run.accelerate.use_cpu:
        this_machine().shown_by(run.accelerate.gpu_ids).refuse_missing_bf16(len(machine_of(run).gpus))


def fetch_base(run: Run) -> None:
    """Downloads what is missing of the base, once for all ranks of this machine and before any of them waits."""
    local_folder(run.recipe.base.model, run.recipe.base.revision)


def _check_gpus(run: Run) -> None:
    """Raises UsageError if a GPU that was asked for is not there, or lacks bf16, or fp8 where the run asks for it.

    Of a GPU that is not known, the ranks find out about fp8.
    """
    from fitune.planning.compute import refuse_missing_fp8
    from fitune.planning.limits import machine_of

    machine = machine_of(run)
    if not run.accelerate.use_cpu:
        machine.refuse_missing_gpus()
        refuse_gpus_without_bf16(run)
        if run.accelerate.num_processes > run.accelerate.num_machines and (short := short_of_shared_memory()):
            print(f"note: {'; '.join(short)}", file=sys.stderr)
    if gpu := machine.known_model:
        refuse_missing_fp8(run, gpu)


def check_fits(run: Run) -> None:
    """Raises UsageError if the run needs more than this machine has free, in the words of `plan`."""
    from fitune.planning.limits import limits_for_training
    from fitune.planning.outlook import lacks_gpus, refusal
    from fitune.planning.plan import make_plan

    plan = make_plan(run, limits_for_training(run))
    if reason := refusal(plan):
        raise UsageError(reason if lacks_gpus(plan) else f"{reason}; --force trains anyway")
