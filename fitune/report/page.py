"""report.html: the parts of the page put together, under a limit of bytes, and written into the run's folder."""

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import jinja2
from markupsafe import Markup

from fitune.columns import short
from fitune.config.command_name import command
from fitune.config.trained_rows import train_hash
from fitune.planning.sizes import GIB
from fitune.report import figures
from fitune.report.charts import Chart, Curve, histogram_chart, line_chart, phase_chart
from fitune.report.differences import marked
from fitune.report.run_files import RunFiles, read_run_files

PAGE = "report.html"
OPTIONS = "report.json"
"What `fitune report` was asked last, in the run's folder: `eval` and `generate` write the page in the same way."
UTF_8 = {"encoding": "utf-8", "errors": "replace"}
"A model's answer may hold half a character, which JSON can and UTF-8 can't."
MOST_BYTES = 2_000_000
SPARE_BYTES = 1_000
"For the line that says how many answers are shown."
MOST_CHARACTERS = 4_000
"Of one answer or prompt."
NOTHING_SAID = Markup("<i>nothing: it ended at once</i>")
"For an answer without a word."
MOST_NAMED = 50
"Rows of a list that data make as long as they like: reasons, examples, starts."


def write_page(folder: Path, compare: tuple[Path, ...] = (), price_per_hour: float | None = None) -> Path:
    """Writes report.html into a run's folder, and returns its path.

    `compare`: folders of further runs. Raises UsageError for a folder that is no run's.
    """
    runs = [read_run_files(path) for path in (folder, *compare)]
    runs = _named_apart(runs)
    file = runs[0].run.folder / PAGE
    _write(file, page(runs, price_per_hour))
    asked = {"compare": [str(path.absolute()) for path in compare], "price_per_hour": price_per_hour}
    _write(file.with_name(OPTIONS), json.dumps(asked, indent=2) + "\n")
    return file


def write_page_again(folder: Path) -> Path:
    """The page as it was asked for last; runs it was compared with and that are gone are left out."""
    try:
        asked = json.loads((folder / OPTIONS).read_text(encoding="utf-8"))
        others = tuple(Path(path) for path in asked["compare"] if (Path(path) / "run.yaml").is_file())
        price = asked["price_per_hour"]
    except (OSError, ValueError, KeyError, TypeError):
        others, price = (), None
    return write_page(folder, others, price)


def show_page_after_a_command(folder: Path, place: Mapping) -> None:
    """Writes the page again and says where it is; of several machines only machine 0 does, by its `place`.

    What goes wrong costs no more than a line: the work is done.
    """
    if place.get("machine_rank"):
        return
    try:
        said = f"page:   {short(str(write_page_again(folder)))}"
    except Exception as error:
        said = f"note: {folder / PAGE} was not written: {error}"
    print(said, file=sys.stderr)


def page(runs: list[RunFiles], price_per_hour: float | None = None) -> str:
    """The whole HTML. The first run's memory, answers, data and settings are shown, beside the others its figures."""
    run = runs[0]
    parts = {
        "run": run,
        "runs": runs,
        "heads": ["", *(run.name for run in runs)],
        "css": Markup((Path(__file__).parent / "page.css").read_text(encoding="utf-8")),
        "figures": figures.key_figures(runs, price_per_hour),
        "curves": _curves(runs),
        "memory_charts": _memory_charts(run),
        "memory": figures.memory_table(run),
        "data": figures.data_rows(run.data),
        "dropped": list((run.data.get("dropped") or {}).items())[:MOST_NAMED],
        "data_notes": (run.data.get("notes") or [])[:MOST_NAMED],
        "data_chart": _data_chart(run),
        "data_changed": _data_changed(run),
        "data_are_new": run.data is run.data_now,
        "differing": _differing(runs),
        "settings": figures.settings(run),
        "origin": figures.origin_rows(run),
        "starts": (run.origin.get("starts") or [])[:MOST_NAMED],
        "repeat": _repeat(run),
        "command": command(),
    }
    rows = run.answers.get("rows") or []
    template = _template("page.html.jinja")
    room = MOST_BYTES - len(template.render(parts, answers=[], answer_count=len(rows)).encode(**UTF_8)) - SPARE_BYTES
    return template.render(parts, answers=_answers(rows, room), answer_count=len(rows))


def _curves(runs: list[RunFiles]) -> list[Chart]:
    several = len(runs) > 1

    def curves(label: str, series, dashed: bool = False, noisy: bool = True) -> list[Curve]:
        names = [", ".join(part for part in (run.name, label) if part) if several else label for run in runs]
        colours = range(len(runs)) if several else [int(dashed)]
        return [Curve(*of, dashed, noisy and not dashed) for of in zip(names, map(series, runs), colours, strict=True)]

    losses = curves("training", lambda run: run.series("loss"))
    losses += curves("held out", lambda run: run.series("eval_loss"), dashed=True)
    gpu = curves("measured", lambda run: run.series("gpu_memory_gib"), noisy=False)
    gpu += curves("planned", lambda run: run.series("gpu_memory_planned_gib"), dashed=True)
    charts = [
        line_chart("Loss", "nats per token", losses),
        line_chart("Gradient norm", "norm", curves("", lambda run: run.series("grad_norm"))),
        line_chart("Learning rate", "rate", curves("", lambda run: run.series("learning_rate"), noisy=False)),
        line_chart("Tokens per second", "tokens/s, all GPUs", curves("", RunFiles.speed)),
        line_chart("GPU memory", "GiB, torch's peak so far", gpu),
    ]
    return [chart for chart in charts if chart]


def _memory_charts(run: RunFiles) -> list[Chart]:
    if run.plan is None:
        return []
    charts, host = [], {phase: sum(parts.values()) / GIB for phase, parts in run.plan.host.items()}
    if run.plan.gpu:
        planned = {phase: size / GIB for phase, size in run.plan.gpu.phases.items()}
        charts.append(phase_chart("One GPU, torch's allocator, by phase", planned, figures.measured_on_gpu(run)))
    return [*charts, phase_chart("Host RAM by phase", host, figures.measured_on_host(run))]


def _data_chart(run: RunFiles) -> Chart | None:
    bins = (run.data.get("tokens") or {}).get("histogram")
    return histogram_chart("Tokens of the training rows", bins) if bins else None


def _data_changed(run: RunFiles) -> bool:
    """Whether the data were prepared again, differently, since the run was started."""
    now = train_hash(run.data_now)
    then = run.origin.get("identity", {}).get("data")
    return bool(now and then and now != then)


def _differing(runs: list[RunFiles]) -> list[figures.Row]:
    """The settings in which runs differ; where they lie is no setting."""
    tables = [figures.settings(run) for run in runs]
    keys = dict.fromkeys(
        key for table in tables for key in table if key not in ("output_dir", "working_folder", "free_gpu_gib")
    )
    rows = [(key, [table.get(key, figures.NOTHING) for table in tables]) for key in keys]
    return [(key, texts) for key, texts in rows if len(set(texts)) > 1]


def _repeat(run: RunFiles) -> str:
    """As it was typed, into another folder; else what starts the settings that were resolved."""
    output = f"{run.run.output_dir}-again"
    starts = run.origin.get("starts") or [{}]
    if typed := starts[0].get("typed"):
        words, kept = shlex.split(typed), []
        for word in words:
            if kept and kept[-1] == "--output":
                kept.pop()
            elif not word.startswith("--output="):
                kept.append(word)
        return shlex.join([*kept, "--output", output])
    config, settings = run.run.accelerate.path, run.run.folder / "run.yaml"
    start = ["accelerate", "launch", "--config_file", config, "-m", "fitune.training.train", f"{output}/run.yaml"]
    return f"mkdir {shlex.quote(output)} && cp {shlex.quote(str(settings))} {shlex.quote(output)}\n{shlex.join(start)}"


def _answers(rows: list[dict], room: int) -> list[Markup]:
    """As many as there is room for, in bytes."""
    answers = []
    for row in rows:
        answers.append(_answer(row))
        room -= len(answers[-1].encode(**UTF_8)) + 1
        if room < 0:
            return answers[:-1]
    return answers


def _answer(row: dict) -> Markup:
    """One held-out prompt: its turns, both answers with their differences marked, and the answer in the data."""
    base, tuned = marked(*(_clipped(row.get(name)) or "" for name in ("base", "tuned")))
    turns = [(str(turn.get("role")), _clipped(turn.get("content"))) for turn in row.get("messages") or []]
    expected = _clipped(row.get("expected"))
    sides = {"base": base, "tuned": tuned, "nothing": NOTHING_SAID}
    return Markup(_template("answer.html.jinja").render(turns=turns, expected=expected, **sides))


def _clipped(value) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    more = len(text) - MOST_CHARACTERS
    return f"{text[:MOST_CHARACTERS]} … {more:,} more characters" if more > 0 else text


def _named_apart(runs: list[RunFiles]) -> list[RunFiles]:
    """By folder; by path where two folders have one name."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return runs
    return [replace(run, name=str(run.run.folder)) for run in runs]


@cache
def _template(name: str) -> jinja2.Template:
    """Every text that is put into it is escaped."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    return jinja2.Environment(loader=loader, **options).get_template(name)


def _write(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, **UTF_8)
    partial.replace(file)
