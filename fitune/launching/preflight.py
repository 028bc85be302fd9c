"""What can be checked before a process is started, and the run folder's opening."""

import json
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from fitune.config import run as runs
from fitune.config.command_name import command
from fitune.config.evaluation import is_evaluated
from fitune.config.hub import local_config
from fitune.config.schema import Run, Strict
from fitune.errors import UsageError
from fitune.launching.run_lock import LOCK, RunLock
from fitune.output_folder import checkpoints

SHARED_FOLDER_SECONDS = 600
LENGTH = ("max_steps", "num_train_epochs")
KEPT_WITH_THE_OPTIMIZER = ("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
"Fields of `training:` that a checkpoint holds beside the optimizer's state; changed, they would not take effect."


def check_before_training(run: Run, *, force: bool = False) -> None:
    """Raises UsageError for what would fail minutes later: missing data, unreachable base model, too little memory."""
    for split in ("train", "test"):
        file = Path(run.recipe.data.prepared) / f"{split}.jsonl"
        if not file.is_file():
            raise UsageError(f"{file}: no such file; run: {command()} prepare {run.recipe_name}")
    if is_evaluated(run.recipe.training) and not (Path(run.recipe.data.prepared) / "test.jsonl").stat().st_size:
        raise UsageError(
            f"{run.recipe.data.prepared}/test.jsonl has no rows, and training.eval_strategy asks for evaluations; "
            f"prepare held-out rows (data.test_split or data.test_fraction), or set training.eval_strategy=no"
        )
    local_config(run.recipe.base.model, run.recipe.base.revision)
    if not force:
        check_fits(run)


def check_fits(run: Run) -> None:
    """Raises UsageError if the run needs more than this machine has free, in the words of `plan`."""
    from fitune.planning.limits import limits_for_training
    from fitune.planning.plan import make_plan
    from fitune.planning.search import refusal

    reason = refusal(make_plan(run, limits_for_training(run)))
    if reason:
        raise UsageError(f"{reason}; --force trains anyway")


def nothing_left(run: Run) -> str | None:
    """What to say instead of resuming a run that has made all steps asked for and has its result; None for others.

    Raises UsageError if other settings were changed, which could have no effect.
    """
    saved = checkpoints(run.folder / "checkpoints")
    if not saved or not run.result_folder.exists():
        return None
    try:
        state = json.loads((saved[-1] / "trainer_state.json").read_text(encoding="utf-8"))
        steps, planned = state["global_step"], state["max_steps"]
        old = runs.load(run.folder / "run.yaml")
    except (OSError, ValueError, KeyError):
        return None  # resuming says what is wrong
    before, now = old.recipe.training, run.recipe.training
    as_long = all(before.get(key) == now.get(key) for key in LENGTH)
    if not ((as_long and steps >= planned) or 0 < now.get("max_steps", -1) <= steps):
        return None
    finished = f"{run.folder} is finished after step {steps}: {run.result_folder}; to train longer, raise training."
    finished += "max_steps" if now.get("max_steps", -1) > 0 else "num_train_epochs"
    if before != now:
        raise UsageError(f"{finished}; other changes would have no effect")
    return finished


def as_started(run: Run) -> Run:
    """A run that is resumed, with the rows and kept layers that `plan` chose when it was started."""
    file = run.folder / "run.yaml"
    if not file.is_file():
        return run
    old = runs.load(file).profile
    return runs.with_numbers(run, **{key: getattr(old, key) for key in run.left_to_plan})


def open_run_folder(run: Run, resume: bool) -> RunLock:
    """Writes run.yaml into a new folder; with `resume` the folder must hold the same run. Returns the folder's lock."""
    file = run.folder / "run.yaml"
    try:
        if resume and not file.is_file():
            raise UsageError(f"{run.folder}: nothing to resume, run.yaml is missing; train without --resume")
        if not resume and run.folder.exists() and any(run.folder.iterdir()):
            if (run.folder / LOCK).exists():
                RunLock(run.folder).release()  # says who trains there, if someone does
            raise UsageError(f"{run.folder} exists; add --resume to continue it, or choose another --output")
        run.folder.mkdir(parents=True, exist_ok=True)
        lock = RunLock(run.folder)
        try:
            if resume and checkpoints(run.folder / "checkpoints"):  # else nothing can be of another run yet
                _refuse_another_run(runs.load(file), run)
            _write(file, runs.dump(run))
        except BaseException:
            lock.release()
            raise
    except OSError as error:
        raise UsageError(f"{run.folder}: cannot be written: {error.strerror}; give another --output") from None
    return lock


def wait_for_run_folder(run: Run) -> AbstractContextManager:
    """On machine 1 and up: until machine 0, which has the lock, wrote the same run.yaml to the folder they share."""
    file, deadline = run.folder / "run.yaml", time.monotonic() + SHARED_FOLDER_SECONDS
    while not file.is_file() or file.read_text(encoding="utf-8") != runs.dump(run):
        if time.monotonic() > deadline:
            raise UsageError(
                f"{file}: not there, or of other settings, after {SHARED_FOLDER_SECONDS} s; give machine 0 the same "
                f"recipe, profile, --set and --output, in a folder that all machines share"
            )
        time.sleep(1)
    return nullcontext()


def _write(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def _refuse_another_run(old: Run, new: Run) -> None:
    """A resumed run may train longer or log differently, but on the same model, data and batches."""
    fixed = ("base", "data", "method", "lora", "max_length", "packing", "global_batch_size", "seed")
    pairs = [(key, getattr(old.recipe, key), getattr(new.recipe, key)) for key in fixed]
    training = old.recipe.training, new.recipe.training
    pairs += [(f"training.{key}", *(block.get(key) for block in training)) for key in KEPT_WITH_THE_OPTIMIZER]
    for pair in pairs:
        key, before, now = _down_to_the_field(*pair)
        if before != now:
            raise UsageError(f"{old.folder} was started with {key} {before}, not {now}: not the same run")


def _down_to_the_field(key: str, before, now) -> tuple:
    """Of two blocks of a recipe, the first field that differs."""
    if not (isinstance(before, Strict) and isinstance(now, Strict)):
        return key, before, now
    fields = [(f"{key}.{name}", getattr(before, name), getattr(now, name)) for name in type(before).model_fields]
    return next(((name, a, b) for name, a, b in fields if a != b), (key, None, None))
