"""What a run's folder holds for its page, whole or not: files that are missing or damaged leave a gap, no error."""

import json
import math
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from fitune.config import run as runs
from fitune.config.schema import Run
from fitune.config.trained_rows import TRAINED_ON
from fitune.errors import FituneError
from fitune.planning.gpu_models import likely_model
from fitune.planning.limits import limits_of
from fitune.planning.plan import Plan, make_plan
from fitune.planning.run_length import steps_of
from fitune.report.origin import ORIGIN

ANSWERS = "answers.json"
"What `generate --test` leaves in a run's folder."
SHAPES = {
    "measurements.json": {"ranks": [{"loading": dict}], "step_seconds": [float | int], "step_tokens": [float | int]},
    "finished.json": {"step": int, "result_step": int},
    "origin.json": {"versions": dict, "hardware": dict, "identity": dict, "starts": [dict]},
    "answers.json": {"rows": [{"messages": [dict]}]},
    "data.json": {"report": dict},
    "report.json": {"tokens": dict, "source": dict, "mixed_in": [dict], "files": dict, "dropped": dict, "notes": list},
}
"Of what the page looks into."
Points = list[tuple[float, float]]
"(optimizer step, value), ascending."


@dataclass(frozen=True)
class RunFiles:
    """One run as its files tell it. `notes` says which of them could not be read."""

    run: Run
    name: str
    lines: list[dict]
    "metrics.jsonl"
    measurements: dict
    finished: dict
    origin: dict
    "Versions, hardware and hashes at the last start that trained; the command of each."
    evaluations: dict[str, dict]
    "By file name without `.json`: metrics by what was measured, and the number of rows."
    answers: dict
    data: dict
    "The report of `prepare`: of the rows that were trained, where the run's folder has it, else of those there now."
    notes: list[str] = field(default_factory=list)
    data_now: dict = field(default_factory=dict)
    "The report in the prepared folder."

    def series(self, key: str) -> Points:
        """Of a value that was logged; what is no finite number is left out."""
        return [(line["step"], line[key]) for line in self.lines if is_number(line.get(key))]

    @property
    def step(self) -> int:
        return self.finished.get("step") or max((line["step"] for line in self.lines), default=0)

    @property
    def hours(self) -> float | None:
        """Of training, pauses between an interruption and `--resume` not counted; None if it was not logged."""
        seconds = [value for _, value in self.series("seconds")]
        if not seconds:
            seconds = [value for _, value in self.series("train_runtime")]
        return seconds[-1] / 3600 if seconds else None

    @cached_property
    def plan(self) -> Plan | None:
        """As `plan` answers now; None where the base's config.json is not at hand."""
        hardware = self.origin.get("hardware", {})
        try:
            gpu = likely_model(self.run.profile.gpu_memory_gib or 0, hardware.get("gpu") or None)
            return make_plan(self.run, limits_of(self.run), gpu)
        except FituneError:
            return None

    @property
    def steps_asked(self) -> int | None:
        return steps_of(self.run)

    def speed(self) -> Points:
        """Tokens per second of all GPUs together; of runs that did not log it, those of the last start."""
        logged = self.series("tokens_per_second")
        seconds, tokens = (self.measurements.get(key, []) for key in ("step_seconds", "step_tokens"))
        if logged or not seconds or len(seconds) != len(tokens):
            return logged
        first = self.step - len(seconds) + 1
        return [(first + i, tokens[i] / took) for i, took in enumerate(seconds) if took > 0]


def read_run_files(path: Path) -> RunFiles:
    """Raises UsageError, one line, for a folder that is no run's."""
    run, notes = runs.load(path), []
    folder = run.folder

    def read(file: Path) -> dict:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            notes.append(f"{file.name} cannot be read, so what it holds is missing here")
            return {}
        return undamaged(content, file.name)

    def undamaged(content: dict, name: str) -> dict:
        shapes = SHAPES.get(name, {})
        damaged = [
            key for key, shape in shapes.items() if content.get(key) is not None and not _is(content[key], shape)
        ]
        notes.extend(f"{name}: {key} is damaged, so what it holds is missing here" for key in damaged)
        return {key: value for key, value in content.items() if value is not None and key not in damaged}

    data_now = read(Path(run.recipe.data.prepared) / "report.json")
    kept = read(folder / TRAINED_ON).get("report")
    evaluations = {file.stem: read(file) for file in sorted(folder.glob("eval*.json"))}
    return RunFiles(
        run=run,
        name=folder.name,
        lines=_lines(folder / "metrics.jsonl"),
        measurements=read(folder / "measurements.json"),
        finished=read(folder / "finished.json"),
        origin=read(folder / ORIGIN),
        evaluations={name: evaluation for name, evaluation in evaluations.items() if evaluation},
        answers=read(folder / ANSWERS),
        data=data_now if kept is None else undamaged(kept, "report.json"),
        notes=notes,
        data_now=data_now,
    )


def _is(value, shape) -> bool:
    """`shape`: a type; a list with that of its members; a dict with those of some of its values."""
    if isinstance(shape, list):
        return isinstance(value, list) and all(_is(member, shape[0]) for member in value)
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(_is(value[key], of) for key, of in shape.items() if key in value)
    return isinstance(value, shape)


def _lines(file: Path) -> list[dict]:
    """Of metrics.jsonl, but for lines that are half written."""
    lines = []
    with suppress(FileNotFoundError):
        for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict) and is_number(line.get("step"))]


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
