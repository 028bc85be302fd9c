"""The run that `train` and `show` take where no profile is given."""

from pathlib import Path

import click

from fitune.config.schema import Run
from fitune.launching.run_folder import found_before
from fitune.planning.hardware import this_machine
from fitune.planning.search import find, part_alone


def fastest_here(
    recipe: str, sets: tuple[str, ...], output: str | None, *, resume: bool = False, machines: int = 1,
    quiet: bool = False,
) -> Run:  # fmt: skip
    """What is fastest on this machine, or was when a run that goes on was started; says what it is unless `quiet`."""
    machine = this_machine()
    if resume and output and (run := found_before(recipe, sets, Path(output), len(machine.gpus))):
        return run
    found = find(recipe, sets, machine, output=output, machines=machines)
    if not quiet:
        uneven = part_alone(recipe, sets, machine, machines=machines)
        for line in filter(None, (found.in_one_line(), found.why_idle(), uneven)):
            click.echo(line, err=True)
    return found.plan.run
