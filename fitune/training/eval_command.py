"""What `fitune eval` does: a run is measured on all its ranks, anything else on one device."""

from pathlib import Path

from fitune.errors import UsageError
from fitune.launching.launch import Place, launch_until_stopped
from fitune.launching.machines import check_machine_flags
from fitune.report.page import show_page_after_a_command
from fitune.training.given_run import check_data, checkpoint_flag, finished_run_or_none


def eval_command(given: Path, data: Path | None, *, tasks: str | None, force: bool, place: Place, **of_tasks) -> int:
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
        from fitune.training.evaluate_folder import print_evaluation

        print_evaluation(given, data, force=force)
        return 0
    check_machine_flags(run, **place)
    check_data(run, asked_as_trained=True, reads_rows=data is None)
    words = [*checkpoint_flag(run), *(["--force"] if force else []), *(["--data", str(data)] if data else [])]
    code = launch_until_stopped(run, "fitune.training.evaluate", *words, place=place)
    if not code:
        show_page_after_a_command(run.folder, place)
    return code


def _evaluate_gguf(file: Path, data: Path | None) -> None:
    if data is None:
        raise UsageError(f"{file}: knows no held-out rows: give --data FOLDER, which prepare wrote")
    from fitune.training.evaluate_folder import print_report
    from fitune.training.evaluate_gguf import evaluate_gguf, leave

    print_report(evaluate_gguf(file, data))
    leave()
