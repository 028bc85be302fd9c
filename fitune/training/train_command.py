"""What `fitune train` does: which run is meant, may it start, and this machine's ranks until they end."""

import os
from contextlib import ExitStack
from pathlib import Path

import click

from fitune.columns import short
from fitune.config import run as runs
from fitune.config.base_of_run import base_of_run
from fitune.config.command_name import command
from fitune.config.hub import local_config
from fitune.config.schema import AUTO, Run
from fitune.data.prepare_command import how_to_prepare
from fitune.errors import UsageError, closest
from fitune.launching.fastest_here import faster_gpus, fastest_here, on_gpus_here
from fitune.launching.finished import finished_at
from fitune.launching.launch import TRAINING, Place, alone, dry_run_text, launch_line, train_with_restarts
from fitune.launching.machines import Machines, check_machine_flags
from fitune.launching.meeting_point import meeting_point
from fitune.launching.preflight import check_before_training, fetch_base, refuse_gpus_without_bf16
from fitune.launching.run_folder import as_started, nothing_left, open_run_folder, refuse_another_resume
from fitune.launching.signals import ignored
from fitune.planning.async_save import waits_for_the_disk
from fitune.planning.fill import filled_here
from fitune.report.origin import remember_what_was_typed
from fitune.report.page import show_page_after_a_command
from fitune.training.given_run import check_data

MOST_NAMED = 8
"Runs of a folder that are named."


def train_command(
    recipe: str, profile: str | None, sets: tuple[str, ...], output: str | None, *, resume: bool, max_restarts: int,
    dry_run: bool, force: bool, machines: int | None, quiet: bool, place: Place,
) -> int:  # fmt: skip
    """The exit code of the run that a recipe or a run's folder stands for; `place` is this machine's among several.

    Raises UsageError for what can be known to fail before a process is started. `quiet` prints the result alone, and
    what goes wrong.
    """
    goes_on = (Path(recipe) / "run.yaml").is_file()
    if resume and not goes_on and (Path(recipe).is_dir() or os.sep in recipe) and not Path(recipe).is_file():
        _refuse_no_run(Path(recipe))
    run = _run_to_train(recipe, profile, sets, output, resume, machines, goes_on, quiet)
    if not dry_run:
        check_machine_flags(run, **place)
        if resume and (finished := nothing_left(run)):
            click.echo(finished)
            return 0
        if goes_on:
            base_of_run(run, local_config)
        else:
            runs.check_paths(recipe, sets, "data.prepared", "data.chat_template", "base.model")
    left, plan_chooses_saving = run, run.profile.async_save == AUTO
    run = on_gpus_here(as_started(run)) if resume else run
    refuse_gpus_without_bf16(run)  # what they cannot do has no time to choose by
    run = filled_here(run)
    if not quiet and (said := faster_gpus(run)):
        click.echo(f"note: {said}", err=True)
    if dry_run:
        if resume:
            refuse_another_resume(run)
        click.echo(dry_run_text(run, resume=resume))
        return 0
    if (chosen := _chosen(left, run)) and not quiet:
        click.echo(f"plan chose: {', '.join(chosen)}")
    if plan_chooses_saving and not quiet and (said := waits_for_the_disk(run)):
        click.echo(f"note: {said}", err=True)
    remember_what_was_typed()
    finished = finished_at(run.folder)
    try:
        again = None if resume else how_to_prepare(recipe, sets, run.recipe.data)
        options = {"resume": resume, "max_restarts": max_restarts, "force": force, "quiet": quiet, "place": place}
        code = _train(run, again, **options)
    except KeyboardInterrupt:
        if finished_at(run.folder) in (None, finished):
            raise
        code = 0  # it came when all was done
    if not code:
        _tell_of_the_result(run, place)
    return code


def _tell_of_the_result(run: Run, place: Place) -> None:
    with ignored():  # a signal has nothing to stop any more
        click.echo(f"result: {short(str(run.result_folder))}")
        click.echo(f"curve:  {short(str(run.folder / 'loss.png'))}")
        show_page_after_a_command(run.folder, place)
        click.echo(f"next:   {command('eval', short(str(run.folder)))}")


def _refuse_no_run(folder: Path) -> None:
    """Raises UsageError, with the runs that `folder` holds, or else the one beside it that has nearly its name."""
    inside, beside = ([file.parent for file in sorted(place.glob("*/run.yaml"))] for place in (folder, folder.parent))
    meant = closest(folder.name, [run.name for run in beside])
    hint = f"; did you mean '{folder.parent / meant}'?" if meant else ""
    if inside:
        hint = f"; it holds runs: {', '.join(map(str, inside[:MOST_NAMED]))}"
    raise UsageError(f"{folder}: no run's folder, which holds a run.yaml{hint}")


def _chosen(left: Run, run: Run) -> list[str]:
    """What `plan` chose of what it was left; of copies, activations and gathered weights only what is unusual."""
    chosen = [f"{key} {getattr(run.profile, key)}" for key in left.left_to_plan]
    chosen += [f"replicas {run.replicas}"] * (run.replicas > left.replicas)
    chosen += ["kept_attention true"] * (run.profile.keeps_attention and not left.profile.keeps_attention)
    chosen += ["activation_offload true"] * (run.profile.moves_activations and not left.profile.moves_activations)
    keeps = run.accelerate.keeps_gathered and not left.accelerate.keeps_gathered
    return chosen + ["reshard_after_forward false"] * keeps


def _run_to_train(
    recipe: str, profile: str | None, sets: tuple[str, ...], output: str | None, resume: bool, machines: int | None,
    goes_on: bool, quiet: bool,
) -> Run:  # fmt: skip
    """The run of a folder that goes on, else a recipe's with the profile, or with what is fastest here."""
    if machines and (profile or goes_on):
        raise UsageError("--machines is for a run without --profile: a profile's accelerate config has num_machines")
    if not goes_on:
        if profile:
            return runs.resolve(recipe, profile, sets, output)
        return fastest_here(recipe, sets, output, resume=resume, machines=machines or 1, quiet=quiet)
    if not resume:
        raise UsageError(f"{recipe} is a run's folder: add --resume to continue it, or give a recipe")
    if output:
        raise UsageError(f"{recipe} is a run's folder, which is continued in place: remove --output {output}")
    return runs.resolve_again(Path(recipe), profile, sets)


def _train(
    run: Run, again: str | None, *, resume: bool, max_restarts: int, force: bool, quiet: bool, place: Place
) -> int:
    """Checks, then starts this machine's ranks, with those of other machines if there are some; the exit code.

    `again` prepares the rows of a recipe anew; those of a run that goes on are what they were.
    """
    several, rank = run.accelerate.num_machines > 1, place["machine_rank"] or 0
    if not quiet:
        click.echo(f"checking {run.recipe_name} on {run.profile_name}: memory, base, rows", err=True)
    with ExitStack() as stack:
        if not rank:
            check_before_training(run, force=force)
            check_data(run, quiet=quiet, again=again)
            stack.enter_context(open_run_folder(run, resume))
        if several:
            machines = stack.enter_context(Machines(run, rank, resume, meeting_point(run, place)))
            if rank:
                run, resume = machines.settings_of_machine_0(run), machines.resume
                check_before_training(run, force=force)
                check_data(run, quiet=quiet)
        if not quiet:
            click.echo(launch_line(run, TRAINING, *(["--resume"] if resume else [])))
        fetch_base(run)
        beside = alone
        if several:
            machines.start_together()
            beside = machines.noticed_while_ranks_run
        restarts = {"max_restarts": max_restarts, "resume": resume}
        code = train_with_restarts(run, **restarts, place=place, beside=beside, quiet=quiet)
        if several:
            machines.ended_with(code)
        return code
