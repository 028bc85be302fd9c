"""A run that a command was given, by its folder or a checkpoint's, and whether its data are still as it says."""

from pathlib import Path

import click

from fitune.columns import short
from fitune.config import run as runs
from fitune.config.command_name import command
from fitune.config.results import missing_of_result
from fitune.config.schema import Run
from fitune.config.trained_rows import rows_at_the_start
from fitune.errors import UsageError
from fitune.launching.finished import passed_step


def finished_run(folder: Path, *, asked: bool = False) -> Run:
    """The finished run of a folder, or that of a checkpoint, which then stands for the run's result.

    Raises UsageError for a run without a result and for a checkpoint that is damaged; also for one of method full,
    which has no model's folder, unless it is only `asked` by the run's own processes.
    """
    if folder.absolute().parent.name != "checkpoints":
        run = runs.load(folder)
        if not run.result_folder.is_dir():
            raise UsageError(
                f"{run.result_folder}: no such folder; the run has not finished: {command('train', '--resume', folder)}"
            )
        if missing := missing_of_result(run):
            raise UsageError(
                f"{missing}: no such file, so the run's result is not whole: put it back, or make it again from the "
                f"last checkpoint: {command('train', '--resume', folder)}"
            )
        if step := passed_step(run.folder):
            raise UsageError(
                f"{folder}: training went on after its result, of step {step}, and has not finished: "
                f"{command('train', '--resume', folder)}; the result as it was is {short(str(run.result_folder))}"
            )
        return run
    run = runs.load(folder.absolute().parents[1]).model_copy(update={"checkpoint": str(folder.absolute())})
    is_full = run.recipe.method == "full"
    if not (folder / "state" if is_full and asked else run.result_folder).is_dir():
        whole_model = "; of method full, eval and generate alone take a checkpoint" if is_full else ""
        raise UsageError(
            f"{run.result_folder}: no such folder; give a run folder or a whole checkpoint of it{whole_model}"
        )
    from fitune.training.manifest import find_damage

    if damage := find_damage(folder):
        raise UsageError(f"{folder}: {damage}; give another checkpoint, or the run's folder")
    return run


def finished_run_or_none(given: Path, *, asked: bool = False) -> Run | None:
    """The run of a folder or checkpoint, as `finished_run`; None for an adapter's, a model's or a GGUF's folder."""
    others = ("adapter_config.json", "config.json", "*.gguf")
    return None if any(list(given.glob(name)) for name in others) else finished_run(given, asked=asked)


def checkpoint_flag(run: Run) -> list[str]:
    """What tells the ranks that a checkpoint was given."""
    return ["--checkpoint", run.checkpoint] if run.checkpoint else []


def on_other_rows(run: Run, data: Path) -> Run:
    """The same run with the test rows of another prepared folder, or of its test.jsonl. UsageError if it has none."""
    folder = data.parent if data.is_file() and data.name == "test.jsonl" else data
    if folder.is_file():
        raise UsageError(f"{data}: a run is measured on rows that were prepared; give a folder that prepare wrote")
    if not (folder / "test.jsonl").is_file():
        raise UsageError(f"{folder / 'test.jsonl'}: no such file; give a folder that prepare wrote, with held-out rows")
    prepared = run.recipe.data.model_copy(update={"prepared": str(folder.absolute())})
    return run.model_copy(update={"recipe": run.recipe.model_copy(update={"data": prepared})})


def check_data(
    run: Run, *, asked_as_trained: bool = False, reads_rows: bool = True, quiet: bool = False, again: str | None = None
) -> None:
    """Raises UsageError for rows that were prepared otherwise than the run's recipe says; unless `quiet` says whose
    they are.

    With `asked_as_trained` also for a template or system message that the run's result was not trained with. With
    `again`, the command that prepares them, also for rows that were chosen otherwise.
    """
    from fitune.config.base_of_run import base_of_run  # not at the top: what needs no tokenizer is refused before
    from fitune.config.hub import local_config
    from fitune.data.dataset import load_tokenizer
    from fitune.data.prepared import check_prepared, dataset_in, refuse_no_rows, refuse_rows_chosen_otherwise
    from fitune.export.chat_record import refuse_another_chat

    data = run.recipe.data
    if reads_rows and not quiet and (prepared_from := dataset_in(Path(data.prepared), data)):
        click.echo(f"data: {data.prepared}, prepared from {prepared_from}")
    tokenizer = load_tokenizer(run.recipe, base_of_run(run, local_config))
    if asked_as_trained:
        refuse_another_chat(run, tokenizer)
    if reads_rows:
        refuse_no_rows(run.recipe, "test")
        check_prepared(run.recipe, tokenizer, is_trained=asked_as_trained, again=again)
        if again:
            refuse_rows_chosen_otherwise(data, again)
            _say_if_sources_changed(Path(data.prepared), again)
        if asked_as_trained and not quiet:
            _say_if_other_rows_were_trained(run)


def changed_split(run: Run) -> str | None:
    """`test`, or of an older run `train`, where its prepared folder holds other rows of it than at the run's start.

    None also where it is not known which rows these were.
    """
    from fitune.data.prepared import sha256_of_rows

    folder, then = Path(run.recipe.data.prepared), rows_at_the_start(run.folder)
    split = "test" if then.get("test") else "train"  # an older run knows its training rows alone
    if not then.get(split) or not (folder / f"{split}.jsonl").is_file():
        return None
    return None if sha256_of_rows(folder, split) == then[split] else split


def _say_if_sources_changed(folder: Path, again: str) -> None:
    from fitune.data.prepared import changed_sources

    if changed := changed_sources(folder):
        names = ", ".join(changed)
        click.echo(
            f"note: {folder} was prepared before {names} changed; to prepare the changed rows: {again}", err=True
        )


def _say_if_other_rows_were_trained(run: Run) -> None:
    """Data may be prepared anew in the same folder; then what is held out now may have been trained before.

    A run without a whole checkpoint does not know its rows, nor does one whose training rows are gone.
    """
    from fitune.data.prepared import sha256_of_rows
    from fitune.training.manifest import read_manifest

    if not (Path(run.recipe.data.prepared) / "train.jsonl").is_file():
        return
    kept = (run.folder / "checkpoints").glob("checkpoint-*")
    for checkpoint in [run.checkpoint] if run.checkpoint else sorted(kept, key=lambda path: path.stat().st_mtime)[-1:]:
        try:
            before = read_manifest(Path(checkpoint)).identity.data
        except ValueError:
            return
        if before != sha256_of_rows(Path(run.recipe.data.prepared), "train"):
            click.echo(
                f"note: {run.recipe.data.prepared}/train.jsonl holds other rows than {run.folder} was trained on; "
                f"rows that are held out now may have been trained"
            )
