"""What a model card says of the rows that were trained on, which may be others than the recipe's."""

from pathlib import Path

from fitune.config.json_file import json_or_nothing
from fitune.config.schema import Run
from fitune.config.trained_rows import TRAINED_ON, rows_at_the_start, train_hash

HEAD = "## Data\n\n"
OTHER_ROWS = (
    "Not described here: the rows that were prepared last are others than those that this model was trained on, and "
    "the run's folder has no report of those."
)


def data_section(run: Run) -> str:
    """Sources, rows and tokens, or why they are not told."""
    report = data_report(run)
    if report is None:
        return HEAD + OTHER_ROWS
    lines = []
    for source in _sources(report):
        version = source.get("revision") or (f"SHA-256 {source['sha256']}" if source.get("sha256") else None)
        name = source["dataset"] if source.get("revision") else Path(source["dataset"]).name
        lines.append(f"- dataset: `{name}`" + (f", version `{version}`" if version else ""))
    if report:
        lines.append(f"- rows: {report['train_rows']:,} to train on, {report['test_rows']:,} held out")
    if tokens := report.get("tokens"):
        lines.append(f"- tokens: {tokens['total']:,}, {tokens['trained_share']:.1%} of them trained")
    if dropped := report.get("dropped"):
        lines.append(f"- rows left out: {', '.join(f'{count:,} {why}' for why, count in dropped.items())}")
    return HEAD + "\n".join(lines) if lines else ""


def datasets_of_the_hub(run: Run) -> list[str]:
    """Their ids."""
    return [source["dataset"] for source in _sources(data_report(run) or {}) if source.get("revision")]


def data_report(run: Run) -> dict | None:
    """What `prepare` wrote of the rows that `run` was trained on, {} where it wrote nothing.

    A run keeps it in data.json. Of an older run it is the prepared folder's, and None if that is of other rows by now.
    """
    if kept := json_or_nothing(run.folder / TRAINED_ON).get("report"):
        return kept
    now = json_or_nothing(Path(run.recipe.data.prepared) / "report.json")
    then, prepared = rows_at_the_start(run.folder).get("train"), train_hash(now)
    return None if then and prepared and then != prepared else now


def _sources(report: dict) -> list[dict]:
    return [source for source in (report.get("source"), *report.get("mixed_in", ())) if source]
