"""Whether checkpoints are written while training goes on: where host RAM has room for a copy."""

import math
from dataclasses import replace

from fitune.config.schema import AUTO, Run
from fitune.errors import UsageError
from fitune.planning.limits import Limits
from fitune.planning.memory import checkpoint_copy, one_checkpoint
from fitune.planning.plan import HOST_ERROR, setup_of, verdicts
from fitune.planning.sizes import GIB, Setup


def with_async_save(run: Run, limits: Limits) -> Run:
    """The run with yes or no where its profile leaves `async_save` to `plan`: yes where the copy fits for sure.

    A machine whose RAM is not known has none to spare. Of a base that is not there the question stays open.
    """
    if run.profile.async_save != AUTO:
        return run
    try:
        setup = setup_of(run)
    except UsageError:
        return run
    is_known = setup.saves and not math.isinf(limits.host)
    has_room = is_known and _has_room(setup, replace(limits, host=limits.host / (1 + HOST_ERROR)))
    return run.model_copy(update={"profile": run.profile.model_copy(update={"async_save": has_room})})


def _has_room(setup: Setup, limits: Limits) -> bool:
    return all(verdict.fits for verdict in verdicts(replace(setup, async_save=True), limits))


def checkpoint_bytes(run: Run) -> float:
    """Of one checkpoint on disk; 0 of a run that saves none."""
    setup = setup_of(run)
    return one_checkpoint(setup) if setup.saves else 0.0


def waits_for_the_disk(run: Run) -> str | None:
    """What to say of a run that saves and has no room for a copy."""
    setup = setup_of(run)
    return None if setup.async_save or not setup.saves else how_it_saves(setup)


def how_it_saves(setup: Setup) -> str | None:
    """One line about its checkpoints; None if it writes none."""
    if not setup.saves:
        return None
    size = f"a checkpoint has {one_checkpoint(setup) / 1e9:,.1f} GB"
    copy = f"{checkpoint_copy(replace(setup, async_save=True)) / GIB:,.1f} GiB"
    where = "each machine's RAM" if setup.machines > 1 else "host RAM"
    if setup.async_save:
        return f"{size}: copied to {where} ({copy}), written while training goes on (profile.async_save)"
    return f"{size}: training waits while it is written; a copy in {where} takes {copy} more (profile.async_save)"
