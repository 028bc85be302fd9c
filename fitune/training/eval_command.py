"""What `fitune eval` does: a run is measured on all its ranks, a folder where it fits, a GGUF by llama.cpp."""

import tempfile
from pathlib import Path

from fitune.errors import UsageError
from fitune.launching.launch import Place, launch_until_stopped
from fitune.launching.machines import check_machine_flags
from fitune.report.page import show_page_after_a_command
from fitune.training.given_run import check_data, checkpoint_flag, finished_run_or_none


def eval_command(
    given: Path, data: Path | None, *, tasks: str | None, load: str, force: bool, place: Place, **of_tasks
) -> int:
    """The exit code; `of_tasks` are the flags that belong to --tasks, `place` this machine's among several."""
    if given.suffix == ".gguf" and given.is_file():
        _evaluate_gguf(given, data)  # which leaves by itself
    run = finished_run_or_none(given)
    if tasks:
        from fitune.training.tasks import tasks_command

        tasks_command(given, run, tasks.split(","), force=force, **of_tasks)
        return 0
    if run is None:
        if data is None:
            raise UsageError(f"{given}: no run, so it knows no held-out rows: give --data FOLDER, which prepare wrote")
        _refuse_folder_of_gguf(given)
        return _evaluate_folder(given, data, load, force)
    if load != "auto":
        raise UsageError(f"--load {load}: a run is measured as it was trained; --load is for folders of models")
    check_machine_flags(run, **place)
    check_data(run, asked_as_trained=True, reads_rows=data is None)
    words = [*checkpoint_flag(run), *(["--force"] if force else []), *(["--data", str(data)] if data else [])]
    code = launch_until_stopped(run, "fitune.training.evaluate", *words, place=place)
    if not code:
        show_page_after_a_command(run.folder, place)
    return code


def _evaluate_folder(given: Path, data: Path, load: str, force: bool) -> int:
    from fitune.training.evaluate_folder import print_evaluation, rows_file
    from fitune.training.given_model import given_model
    from fitune.training.model_run import how_to_hold, run_to_ask

    rows = rows_file(data)  # looked for before anything starts
    model = given_model(given, force=force)
    if way := how_to_hold(model, load, exact=True):
        with tempfile.TemporaryDirectory(prefix="fitune-") as scratch:
            run = run_to_ask(model, way, Path(scratch))
            return launch_until_stopped(run, "fitune.training.evaluate_model", str(rows.absolute()))
    print_evaluation(model, data)
    return 0


def _refuse_folder_of_gguf(given: Path) -> None:
    if files := sorted(str(file) for file in given.glob("*.gguf")):
        raise UsageError(f"{given}: give one of the files in it: {', '.join(files)}")


def _evaluate_gguf(file: Path, data: Path | None) -> None:
    if data is None:
        raise UsageError(f"{file}: knows no held-out rows: give --data FOLDER, which prepare wrote")
    from fitune.export.llama_cpp import leave
    from fitune.training.evaluate_folder import print_report
    from fitune.training.evaluate_gguf import evaluate_gguf

    print_report(evaluate_gguf(file, data))
    leave()
