"""A run's folder: whose it is, what was trained in it, and what is asked of a run that goes on.

run.yaml        the settings of what was trained here; until the first step, of what will be
accelerate.yaml how its processes start: `accelerate launch --config_file` takes it
resume.yaml     what a resume asks for; from its first step on that is run.yaml, and never if it is refused
resume-accelerate.yaml  how that starts; likewise
finished.json   that it has a result, and of which step: see `fitune.launching.finished`
"""

import errno
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fitune.config import run as runs
from fitune.config.accelerate_config import read_accelerate_config, written_out
from fitune.config.command_name import command
from fitune.config.evaluation import stops_early
from fitune.config.optimizers import DEFAULT as DEFAULT_OPTIMIZER
from fitune.config.recipe_paths import absolute_paths
from fitune.config.results import missing_of_result
from fitune.config.run import FOUND
from fitune.config.schema import AUTO, Run
from fitune.config.shipped import name_of
from fitune.errors import UsageError
from fitune.launching.finished import go_on_from, noted_best, read_finished, write_finished
from fitune.launching.run_lock import LOCK, RunLock
from fitune.output_folder import checkpoints, write_whole

SETTINGS, ASKED = "run.yaml", "resume.yaml"
LAUNCH, ASKED_LAUNCH = FOUND, "resume-accelerate.yaml"
TRAINER_STATE = "trainer_state.json"
"transformers' TRAINER_STATE_NAME, which takes seconds to import."
FIXED = ("base", "data", "method", "lora", "max_length", "packing", "global_batch_size", "seed")
"Keys of a recipe that make a run the run it is: it may train longer or log differently, but not on something else."
KEPT_WITH_THE_OPTIMIZER = {
    "optim": DEFAULT_OPTIMIZER, "optim_args": None, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
}  # fmt: skip
"""Fields of `training:` that a checkpoint holds beside the optimizer's state, with what they are by default; changed,
they would not take effect."""

FOLLOWS_EVALUATIONS = "reduce_lr_on_plateau"
"A schedule whose state is what it has seen; any other is known from the step, and may be exchanged on the way."
KEPT_WITH_THE_SCHEDULE = dict.fromkeys(("learning_rate", "lr_scheduler_kwargs", "metric_for_best_model"))
"Likewise of such a schedule."


def as_started(run: Run) -> Run:
    """A run that is resumed, with what `plan` chose at its start: copies, rows, what is kept, gathered weights."""
    file = run.folder / SETTINGS
    if not file.is_file():
        return run
    old = runs.load(file)
    spread = [(one.accelerate.num_processes, one.accelerate.num_machines) for one in (old, run)]
    if run.profile.replicas == AUTO and spread[0] == spread[1]:  # other GPUs can hold another number
        run = run.model_copy(update={"profile": run.profile.model_copy(update={"replicas": old.profile.replicas})})
    started = {"kept_attention": old.profile.keeps_attention, "activation_offload": old.profile.moves_activations}
    given = {key: value for key in started if (value := getattr(run.profile, key)) != AUTO}
    run = runs.with_activations(run, **started | given)
    if run.accelerate.reshard_after_forward == AUTO and run.may_keep_gathered:
        run = runs.with_resharding(run, not old.accelerate.keeps_gathered)
    return runs.with_numbers(run, **{key: getattr(old.profile, key) for key in run.left_to_plan})


@contextmanager
def open_run_folder(run: Run, resume: bool) -> Iterator[None]:
    """Holds the folder's lock and has the run's settings in it; with `resume` the folder must hold the same run.

    A folder in which nothing was trained is as good as a new one. Raises UsageError.
    """
    try:
        lock = _lock(run, resume)
        try:
            _write_settings(run, resume)
        except BaseException:
            lock.release()
            raise
    except OSError as error:
        to_do = "make room there" if error.errno == errno.ENOSPC else "give another --output"
        raise UsageError(f"{run.folder}: cannot be written: {error.strerror}; {to_do}") from None
    with lock:
        try:
            yield
        finally:
            _withdraw(run.folder)


def settings_to_train(folder: Path) -> Path:
    """The file that the ranks are started with."""
    asked = folder / ASKED
    return asked if asked.is_file() else folder / SETTINGS


def launch_config(run: Run, settings: Path | None) -> Path:
    """The accelerate config that the processes of a run are started with: the folder's own, where it has one.

    Raises UsageError for one that is gone or damaged, before a process starts.
    """
    asked = settings is not None and settings.name == ASKED
    own = run.folder / (ASKED_LAUNCH if asked else LAUNCH)
    file = own if own.is_file() else Path(run.accelerate.path)
    if not file.is_file():
        raise UsageError(f"{file}: no such file; it says how the run's processes start: put it, or a copy, at {own}")
    read_accelerate_config(file)
    return file


def found_before(recipe_name: str, sets: tuple[str, ...], folder: Path, gpus: int) -> Run | None:
    """A recipe's run as `plan` found it when it was started in `folder`, if there are still as many GPUs as it takes.

    So a resume does not hang on what is free at the moment. What `sets` gives of the profile is searched for anew.
    """
    recipe_overrides, profile_overrides = runs.parse_sets(sets)
    if profile_overrides or not (folder / SETTINGS).is_file():
        return None
    old = runs.load(folder / SETTINGS)
    if old.profile.accelerate_config != FOUND or old.profile.num_gpus > gpus * old.accelerate.num_machines:
        return None
    recipe = runs.load_recipe(recipe_name, recipe_overrides)
    return runs.run_of(
        name_of(recipe_name), recipe, old.profile_name, old.profile, old.accelerate, str(folder.absolute())
    )


def refuse_to_begin_again(run: Run) -> None:
    """Raises UsageError for a run that is not resumed, in a folder that something was trained in."""
    if not run.resume and _was_trained_in(run):
        raise UsageError(f"{run.folder} exists; add --resume to continue it, or choose another --output")


def accept_settings(run: Run) -> None:
    """What was asked for is the run's from now on. Called by the main process."""
    accepted = run.model_copy(update={"resume": False})
    if not _holds(run.folder / SETTINGS, accepted):
        write_whole(run.folder / SETTINGS, runs.dump(accepted))
    if (run.folder / ASKED_LAUNCH).is_file():
        write_whole(run.folder / LAUNCH, (run.folder / ASKED_LAUNCH).read_text(encoding="utf-8"))


def begin_to_train(run: Run) -> None:
    """Called by the main process after the first step: what was asked for is accepted, and the result outdated."""
    accept_settings(run)
    go_on_from(run.folder)


def finish(run: Run, step: int, epoch: float, stopped_early: bool = False) -> None:
    """Called by the main process when the result is written. `step` is the last, by early stopping perhaps."""
    asked = steps_asked(run.recipe.training, step, epoch)
    content = {"step": step, "epoch": epoch, "asked": asked, "stopped_early": stopped_early and step < asked}
    best = noted_best(run.folder) if run.recipe.training.get("load_best_model_at_end") else None
    write_finished(run.folder, content | ({"result_step": best} if best not in (None, step) else {}))


def steps_asked(training: dict, step: int, epoch: float) -> int:
    """Optimizer steps that a `training:` block asks for, known the epoch in which `step` ended."""
    if training.get("max_steps", -1) > 0:
        return training["max_steps"]
    return math.ceil(training.get("num_train_epochs", 3) * round(step / epoch))


def nothing_left(run: Run) -> str | None:
    """What to say instead of resuming a run that has made all steps asked for and has its result; None for others.

    More steps may be asked for on the command line, or in run.yaml, which then no longer says what was trained.
    Raises UsageError if another run is asked for, or other settings, which could have no effect.
    """
    try:
        result = read_finished(run.folder)
        step, epoch = result["step"], result["epoch"]
        old = runs.load(run.folder / SETTINGS)
    except (KeyError, UsageError):
        return None  # resuming says what is wrong
    if not run.result_folder.is_dir() or missing_of_result(run):
        return None
    _refuse_another_run(old, run)
    training = run.recipe.training
    is_changed = (old.recipe.training, old.recipe.early_stopping) != (training, run.recipe.early_stopping)
    asked = steps_asked(training, step, epoch)
    stops_again = stops_early(run.recipe, _newest_log(run.folder))
    if asked > step and not stops_again and (is_changed or asked > result.get("asked", asked)):
        return None
    early = ", where it stopped early" if result.get("stopped_early") else ""
    longer = ["early_stopping.patience"] if stops_again else []
    if asked <= step or not stops_again:
        longer += ["training.max_steps" if training.get("max_steps", -1) > 0 else "training.num_train_epochs"]
    finished = f"{run.folder} is finished after step {step}{early}: {run.result_folder}; "
    finished += f"to train longer, raise {' and '.join(longer)}"
    if is_changed:
        raise UsageError(f"{finished}; other changes would have no effect")
    return finished


def _newest_log(folder: Path) -> list[dict]:
    """What the newest checkpoint's trainer had logged."""
    for checkpoint in reversed(checkpoints(folder / "checkpoints")):
        with suppress(OSError, ValueError, KeyError):
            return json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))["log_history"]
    return []


def refuse_another_resume(run: Run) -> None:
    """Raises UsageError for a run that would go on from checkpoints with something else than what may change."""
    if checkpoints(run.folder / "checkpoints") and (run.folder / SETTINGS).is_file():
        _refuse_another_run(runs.load(run.folder / SETTINGS), run)


def _lock(run: Run, resume: bool) -> RunLock:
    """The lock of the run's folder, which is made if there is none. Raises UsageError if it may not be trained in."""
    folder = run.folder
    if resume and not (folder / SETTINGS).is_file():
        raise UsageError(f"{folder}: nothing to resume, {SETTINGS} is missing; train without --resume")
    if not resume and folder.exists():
        if (folder / LOCK).exists():
            RunLock(folder).release()  # says who trains there, if someone does
        refuse_to_begin_again(run)
        of_others = [path for path in folder.iterdir() if path.name not in (LOCK, f".{SETTINGS}.partial")]
        if of_others and not (folder / SETTINGS).is_file():
            raise UsageError(f"{folder} exists and is not a run's folder; choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    return RunLock(folder)


def _was_trained_in(run: Run) -> bool:
    """Whether something would be lost: a checkpoint, a result, or what a run logged that was told to save nothing."""
    log = run.folder / "metrics.jsonl"
    logged = log.is_file() and log.stat().st_size > 0
    return logged or bool(checkpoints(run.folder / "checkpoints")) or run.result_folder.exists()


def _write_settings(run: Run, resume: bool) -> None:
    """As run.yaml, where nothing can be of another run yet; else they stand beside it until they are accepted."""
    _withdraw(run.folder)
    if not (resume and checkpoints(run.folder / "checkpoints")):
        write_whole(run.folder / SETTINGS, runs.dump(run))
        write_whole(run.folder / LAUNCH, _launch_text(run))
        return
    refuse_another_resume(run)
    write_whole(run.folder / ASKED, runs.dump(run))
    write_whole(run.folder / ASKED_LAUNCH, _launch_text(run))


def _withdraw(folder: Path) -> None:
    """What a resume asked for is no longer asked."""
    for name in (ASKED, ASKED_LAUNCH):
        (folder / name).unlink(missing_ok=True)


def _launch_text(run: Run) -> str:
    """The run's accelerate config: as its file says where that still holds, else written out."""
    file = Path(run.accelerate.path)
    if file.is_file() and read_accelerate_config(file) == run.accelerate:
        return file.read_text(encoding="utf-8")
    return written_out(run.accelerate)


def _holds(file: Path, run: Run) -> bool:
    try:
        return runs.load(file) == run
    except UsageError:
        return False


def _refuse_another_run(old: Run, new: Run) -> None:
    """Raises UsageError for the first field that may not change and did, old and new named."""
    _refuse_other_states(old, new)
    before, now = (absolute_paths(run.recipe.model_dump()) for run in (old, new))
    pairs = [(key, before[key], now[key]) for key in FIXED]
    kept = KEPT_WITH_THE_OPTIMIZER
    schedules = [recipe["training"].get("lr_scheduler_type", "linear") for recipe in (before, now)]
    if FOLLOWS_EVALUATIONS in schedules:
        pairs.append(("training.lr_scheduler_type", *schedules))
        kept = kept | KEPT_WITH_THE_SCHEDULE
    pairs += [
        (f"training.{key}", *(recipe["training"].get(key, default) for recipe in (before, now)))
        for key, default in kept.items()
    ]
    for pair in pairs:
        key, was, is_now = _down_to_the_field(*pair)
        if was != is_now:
            resume = command("train", "--resume", old.folder)
            raise UsageError(
                f"{old.folder} was started with {key} {was}, not {is_now}: not the same run; "
                f"give it as it was (`{resume}` does), or another --output"
            )


def _refuse_other_states(old: Run, new: Run) -> None:
    """Likewise for what checkpoints hold of the optimizer, which a profile says."""
    states = old.profile.optimizer_state
    if states != new.profile.optimizer_state:
        raise UsageError(
            f"{old.folder} was trained with profile.optimizer_state {states}, which its checkpoints hold; use --set "
            f"profile.optimizer_state={states}, or train into another --output"
        )


def _down_to_the_field(key: str, before, now) -> tuple:
    """Of two blocks of a recipe, the first field that differs."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return key, before, now
    fields = [(f"{key}.{name}", before.get(name), now.get(name)) for name in before | now]
    return next(((name, a, b) for name, a, b in fields if a != b), (key, None, None))
