"""Where a run that is resumed goes on: its newest whole checkpoint, and how many steps are left after it."""

import sys
from pathlib import Path

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from fitune.config.evaluation import stops_early
from fitune.config.schema import Run
from fitune.errors import UsageError
from fitune.launching.heartbeat import Heartbeat
from fitune.launching.run_folder import steps_asked
from fitune.output_folder import checkpoints
from fitune.training.checkpoint import set_aside
from fitune.training.distributed import from_rank_0, is_main_process
from fitune.training.manifest import Identity, find_damage, refuse_another_identity


def checkpoint_to_resume(run: Run, identity: Identity, heartbeat: Heartbeat) -> Path | None:
    """The newest whole checkpoint of a run that is resumed, None if it was ended before the first was written.

    Says which it skipped and why, and sets those aside. Call on all ranks.
    """
    found = checkpoints(run.folder / "checkpoints") if run.resume else []
    with heartbeat.waiting():
        found = from_rank_0(found)
    if not found:
        return None
    skipped = []
    for checkpoint in reversed(found):
        damage = find_damage(checkpoint, heartbeat.waiting)
        if not damage:
            refuse_another_identity(checkpoint, identity)
            if is_main_process():
                set_aside(checkpoint.parent, skipped)
            return checkpoint
        skipped.append(checkpoint)
        if is_main_process():
            print(f"{checkpoint}: skipped: {damage}", file=sys.stderr)
    raise UsageError(f"{run.folder / 'checkpoints'}: no whole checkpoint to resume from; train into another --output")


def steps_left_after(run: Run, checkpoint: Path | None) -> int | None:
    """What is asked for beyond the checkpoint, None without one; the main process says where the run goes on.

    Raises UsageError if less is asked for than the checkpoint has.
    """
    if checkpoint is None:
        if run.resume and is_main_process():
            print(f"{run.folder}: no checkpoint was written: training begins at the first step", file=sys.stderr)
        return None
    state = state_of(checkpoint)
    if stops_early(run.recipe, state.log_history):
        return 0
    asked = steps_asked(run.recipe.training, state.global_step, state.epoch)
    if asked < state.global_step:
        raise UsageError(
            f"{checkpoint} is {state.global_step} steps long, {asked} are asked for: ask for at least as many, or "
            f"remove the checkpoints beyond them"
        )
    if is_main_process():
        print(f"{run.folder}: goes on after step {state.global_step} of {asked}: {checkpoint.name}", file=sys.stderr)
    return asked - state.global_step


def state_of(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
