"""What can be checked before a process is started, and the run folder's opening."""

from pathlib import Path

from fitune import run as runs
from fitune.config import Run
from fitune.errors import UsageError
from fitune.hub import local_config
from fitune.run_lock import LOCK, RunLock


def check_before_training(run: Run, *, force: bool = False) -> None:
    """Raises UsageError for what would fail minutes later: missing data, unreachable base model, too little memory."""
    for split in ("train", "test"):
        file = Path(run.recipe.data.prepared) / f"{split}.jsonl"
        if not file.is_file():
            raise UsageError(f"{file}: no such file; run: python cli.py prepare {run.recipe_name}")
    local_config(run.recipe.base.model, run.recipe.base.revision)
    if not force:
        check_fits(run)


def check_fits(run: Run) -> None:
    """Raises UsageError if the run needs more than this machine has free, in the words of `plan`."""
    from fitune.plan_search import limits_for_training, plan_with_changes, refusal

    reason = refusal(plan_with_changes(run, limits_for_training(run)))
    if reason:
        raise UsageError(f"{reason}; --force trains anyway")


def open_run_folder(run: Run, resume: bool) -> None:
    """Writes run.yaml into a new folder; with `resume` the folder must hold the same run."""
    file = run.folder / "run.yaml"
    if (run.folder / LOCK).exists():
        RunLock(run.folder).release()
    if resume:
        if not file.is_file():
            raise UsageError(f"{run.folder}: nothing to resume, run.yaml is missing; train without --resume")
        _refuse_another_run(runs.load(file), run)
    elif run.folder.exists() and any(run.folder.iterdir()):
        raise UsageError(f"{run.folder} exists; add --resume to continue it, or choose another --output")
    run.folder.mkdir(parents=True, exist_ok=True)
    file.write_text(runs.dump(run), encoding="utf-8")


def _refuse_another_run(old: Run, new: Run) -> None:
    """A resumed run may train longer or log differently, but on the same model, data and batches."""
    for key in ("base", "data", "method", "lora", "max_length", "packing", "global_batch_size", "seed"):
        before, now = getattr(old.recipe, key), getattr(new.recipe, key)
        if before != now:
            raise UsageError(
                f"{old.folder} was started with {key} {_plain(before)}, not {_plain(now)}: not the same run"
            )


def _plain(value):
    return value.model_dump() if hasattr(value, "model_dump") else value
