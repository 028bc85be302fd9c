"""What `fitune eval` does: a run is measured on all its ranks, a folder where it fits, a GGUF by llama.cpp."""

import sys
import tempfile
from pathlib import Path

from fitune.config.gguf_files import SUFFIX, refuse_gguf
from fitune.config.schema import Run
from fitune.errors import UsageError
from fitune.launching.launch import Place, launch_until_stopped
from fitune.launching.machines import check_machine_flags, refuse_machine_flags
from fitune.launching.roll_call import launch_together
from fitune.planning.asking import Reading
from fitune.report.page import show_page_after_a_command
from fitune.training.asked_here import held_here, rows_of_eval
from fitune.training.given_run import changed_split, check_data, checkpoint_flag, finished_run_or_none, on_other_rows


def eval_command(
    given: Path, data: Path | None, *, tasks: str | None, load: str, force: bool, place: Place, **of_tasks
) -> int:
    """The exit code; `of_tasks` are the flags that belong to --tasks, `place` this machine's among several."""
    _refuse_ignored_flags(data, tasks=tasks, load=load, **of_tasks)
    if not tasks and given.suffix == SUFFIX and given.is_file():
        refuse_machine_flags(given, **place)
        _evaluate_gguf(given, data, load)  # which leaves by itself
    run = finished_run_or_none(given, asked=not tasks)
    if tasks:
        from fitune.training.tasks import tasks_command

        refuse_machine_flags(given, **place)
        tasks_command(given, run, tasks.split(","), force=force, **of_tasks)
        return 0
    if run is None:
        refuse_gguf(given, "run, adapter or model's folder")
        refuse_machine_flags(given, **place)
        if data is None:
            raise UsageError(f"{given}: no run, so it knows no held-out rows: give --data FOLDER, which prepare wrote")
        return _evaluate_folder(given, data, load, force)
    if load != "auto":
        raise UsageError(f"--load {load}: a run is measured as it was trained; --load is for folders of models")
    check_machine_flags(run, **place)
    check_data(on_other_rows(run, data) if data else run, asked_as_trained=True, quiet=data is not None)
    data = data or _prepared_since(run)
    words = [*checkpoint_flag(run), *(["--force"] if force else []), *(["--data", str(data)] if data else [])]
    with held_here(run, rows_of_eval(run)) as held:
        words += held.flags
        code = launch_together(run, "fitune.training.evaluate", *words, config=held.config, place=place)
    if not code:
        show_page_after_a_command(run.folder, place)
    return code


def _prepared_since(run: Run) -> Path | None:
    """The run's prepared folder where it holds other rows than when the run was started; says how they are measured."""
    if (split := changed_split(run)) is None:
        return None
    folder = Path(run.recipe.data.prepared).absolute()
    name = "-".join(["eval", *([Path(run.checkpoint).name] if run.checkpoint else [])])
    print(
        f"note: {folder}/{split}.jsonl holds other rows than when {run.folder} was started: the result goes into "
        f"{name}-{folder.name}.json, and {name}.json stays as it is",
        file=sys.stderr,
    )
    return folder


def _refuse_ignored_flags(data: Path | None, *, tasks: str | None, load: str, include, limit, file) -> None:
    """UsageError for a flag that would do nothing: of held-out rows beside --tasks, of --tasks without it."""
    of_tasks = {"--include": include, "--limit": limit, "--json": file}
    of_rows = {"--data": data, "--load": load != "auto"}
    ignored = [flag for flag, is_given in (of_rows if tasks else of_tasks).items() if is_given]
    if ignored and tasks:
        raise UsageError(f"{ignored[0]} is for held-out rows; lm-eval's tasks bring their own: leave it or --tasks out")
    if ignored:
        raise UsageError(f"{ignored[0]} is for lm-eval's tasks: add --tasks NAME, or leave it out")


def _evaluate_folder(given: Path, data: Path, load: str, force: bool) -> int:
    from fitune.training.evaluate_folder import longest_row, print_evaluation, rows_file, tokenise
    from fitune.training.given_model import given_model
    from fitune.training.model_run import how_to_hold, run_to_ask

    rows = rows_file(data)  # looked for before anything starts
    model = given_model(given, force=force)
    model.check_chat_template("without one, answers cannot be told from questions")
    with tempfile.TemporaryDirectory(prefix="fitune-") as scratch:
        tokens = tokenise(rows, model, Path(scratch))
        reading = Reading(longest_row(tokens), answers=False)
        if way := how_to_hold(model, load, exact=True, reading=reading):
            run = run_to_ask(model, way, Path(scratch))
            return launch_until_stopped(run, "fitune.training.evaluate_model", str(tokens.path))
        print_evaluation(model, tokens)
    return 0


def _evaluate_gguf(file: Path, data: Path | None, load: str) -> None:
    if load != "auto":
        raise UsageError(f"--load {load}: llama.cpp holds a GGUF as it is; --load is for folders of models")
    if data is None:
        raise UsageError(f"{file}: knows no held-out rows: give --data FOLDER, which prepare wrote")
    from fitune.export.llama_cpp import leave
    from fitune.training.evaluate_folder import print_report
    from fitune.training.evaluate_gguf import evaluate_gguf

    print_report(evaluate_gguf(file, data))
    leave()
