"""docs/settings.md: what became of every field of SFTConfig and of every optimizer."""

import importlib.metadata
from dataclasses import dataclass, field
from pathlib import Path

from trials import Trial

from fitune.config.optimizers import ARGUMENTS, nearest_fit
from fitune.config.training_fields import CHOICES, LIMITS, OWNED_ELSEWHERE, REFUSED

PAGE = Path(__file__).resolve().parents[2] / "docs" / "settings.md"
INTRODUCTION = """\
# Every setting of `training:`

A recipe's `training:` block takes the fields of TRL's SFTConfig by their own names. This page says what becomes of each
of the {fields} fields: it works, another file owns it, or it is refused. `make settings` makes the page. It gives each
field alone to the real `plan` and `train` commands, on a tiny model with two ranks on the CPU. A field that works was
compared with the same run without it: "changes" is what differed. A field that is refused stops both commands with one
line and exit code 2, before anything is loaded.

Made with transformers {transformers} and trl {trl}.
"""
WORKS = """\
## Fields that work

"with": what else was set, because the field says nothing without it; "alone": what the error says then. "same run": not
one digit of losses and weights differs.

| field | allowed | tried with | changes |
|---|---|---|---|
"""
OWNED = """\
## Fields that are set elsewhere

| field | instead |
|---|---|
"""
REFUSED_HERE = """\
## Fields that are refused

| field | why |
|---|---|
"""
OPTIMIZERS = """\
## Optimizers

Those that work train on one rank, on two, and on two with their weights in host RAM. In each place a run that was
resumed after three of its six steps ended with the bytes of the run that was not.

| `training.optim` | {places} |
|---|{rules}|
"""
OTHER_OPTIMIZERS = """
Every other optimizer that transformers names is refused:

| `training.optim` | why | the nearest that works |
|---|---|---|
"""


@dataclass(frozen=True)
class Result:
    """Of a trial: `train`'s exit code, and what it changed or what it was told."""

    trial: Trial
    code: int
    changes: list[str] = field(default_factory=list)
    said: str = ""
    alone: str = ""
    "What the field alone, without what it needs, is told."


@dataclass(frozen=True)
class OptimizerResult:
    """By place, whether the optimizer trained there and resumed exactly."""

    name: str
    exact: dict[str, bool]


def write_page(page: Path, tried: list[Result], refused: list[Result], optimizers: list[OptimizerResult]) -> None:
    fields = {result.trial.field for result in (*tried, *refused)}
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "trl")}
    places = list(optimizers[0].exact)
    owned = [result for result in refused if result.trial.field in OWNED_ELSEWHERE]
    others = [result for result in refused if result.trial.field in REFUSED]
    parts = [
        INTRODUCTION.format(fields=len(fields), **versions),
        WORKS + "".join(map(_works, tried)),
        OWNED + "".join(_row(_name(result), _told(result)) for result in owned),
        REFUSED_HERE + "".join(_row(_name(result), _told(result)) for result in others),
        OPTIMIZERS.format(places=" | ".join(places), rules="|".join("---" for _ in places))
        + "".join(_row(f"`{o.name}`", *("exact" if o.exact[place] else "NO" for place in places)) for o in optimizers)
        + OTHER_OPTIMIZERS
        + "".join(_other_optimizer(result) for result in refused if result.trial.field == "optim"),
    ]
    page.write_text("\n".join(parts), encoding="utf-8")


def allowed(name: str) -> str:
    """In words, where fitune knows more than the field's type."""
    if name in CHOICES:
        return ", ".join(CHOICES[name])
    return LIMITS[name][1] if name in LIMITS else ""


def _works(result: Result) -> str:
    trial = result.trial
    if result.code:
        changes = f"refused here: {result.said}"
    elif result.changes:
        changes = "; ".join(result.changes)
    else:
        changes = f"same run: {trial.same}"
    alone = f" (alone: {result.alone})" if result.alone else ""
    return _row(_name(result), allowed(trial.field), f"`{trial.written}`", changes + alone)


def _other_optimizer(result: Result) -> str:
    name = result.trial.value
    why = result.said.partition(f"training.optim={name} ")[2].partition("; the nearest")[0]
    return _row(f"`{name}`", why, f"`{nearest_fit(name)}`" if nearest_fit(name) in ARGUMENTS else "")


def _told(result: Result) -> str:
    return result.said.partition(": ")[2]


def _name(result: Result) -> str:
    return f"`{result.trial.field}`"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
