"""The run that `train` and `show` take where no profile is given, and the GPUs of one that goes on."""

from contextlib import suppress
from pathlib import Path

import click

from fitune.config.run import FOUND
from fitune.config.schema import Run
from fitune.errors import UsageError
from fitune.launching.run_folder import found_before
from fitune.planning.hardware import this_machine
from fitune.planning.search import find, with_fastest_gpus


def on_gpus_here(run: Run) -> Run:
    """A run that `plan` found and that goes on: on the GPUs that it was started on, or where one of them is gone, or
    hidden, on those that are fastest for it now."""
    accelerate = run.accelerate
    if run.profile.accelerate_config != FOUND or accelerate.use_cpu or accelerate.num_machines > 1:
        return run
    machine = this_machine()
    if accelerate.gpu_ids and not machine.shown_by(accelerate.gpu_ids).missing:
        return run
    return with_fastest_gpus(run, machine)


def faster_gpus(run: Run) -> str | None:
    """Where a profile takes the first GPUs and others are faster for it, how to give it those; in one line."""
    accelerate, machine = run.accelerate, this_machine()
    if run.profile.accelerate_config == FOUND or accelerate.use_cpu or accelerate.num_machines > 1:
        return None
    if accelerate.gpu_ids or not machine.uneven:
        return None
    with suppress(UsageError):  # a base that is not there is for the checks to name
        better = machine.shown_by(with_fastest_gpus(run, machine).accelerate.gpu_ids).first(accelerate.num_processes)
        first = machine.first(accelerate.num_processes)
        if better.gpus != first.gpus:
            taken = "; ".join(f"{gpu.shown_as} ({gpu.in_words})" for gpu in first.gpus)
            return f"the profile takes the first GPUs, {taken}; for faster ones: {better.in_variable}"
    return None


def fastest_here(
    recipe: str, sets: tuple[str, ...], output: str | None, *, resume: bool = False, machines: int = 1,
    quiet: bool = False,
) -> Run:  # fmt: skip
    """What is fastest on this machine, or was when a run that goes on was started; says what it is unless `quiet`."""
    machine = this_machine()
    if resume and output and (run := found_before(recipe, sets, Path(output), len(machine.with_bf16.gpus))):
        return run
    found = find(recipe, sets, machine, output=output, machines=machines)
    if not quiet:
        for line in filter(None, (found.in_one_line(), found.why_idle(), found.uneven)):
            click.echo(line, err=True)
    return found.plan.run
