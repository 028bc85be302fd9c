"""How long a run is, by what `prepare` counted: its steps, its checkpoints, and how long its examples are."""

import json
import math
from pathlib import Path

from fitune.config.evaluation import keeps_the_best
from fitune.config.recipe import Recipe
from fitune.config.schema import Run

SAVES_WITHOUT_LIMIT = 3
"Checkpoints that pile up where neither save_total_limit nor what sets their number is known."
EPOCHS = 3
"Of a run that says neither them nor max_steps: as transformers has it."


def kept_checkpoints(run: Run) -> int:
    """How many a run leaves on the disk."""
    training = run.recipe.training
    if training.get("save_strategy") == "no":
        return 0
    if (training.get("save_total_limit") or 0) > 0:
        return training["save_total_limit"] + keeps_the_best(training)
    return _all_saves(run) or SAVES_WITHOUT_LIMIT


def _all_saves(run: Run) -> int | None:
    """Of a whole run, its last step among them; None where that is not known."""
    training = run.recipe.training
    if training.get("save_strategy") == "epoch":
        return _epochs(run)
    every, steps = training.get("save_steps", 0), steps_of(run)
    if 0 < every < 1:  # a share of the run
        return math.ceil(1 / every)
    return math.ceil(steps / every) if steps and every else None


def _epochs(run: Run) -> int | None:
    """Begun ones: as many as max_steps takes where that is given; None without the number of rows."""
    training = run.recipe.training
    if training.get("max_steps", -1) <= 0:
        return math.ceil(training.get("num_train_epochs", EPOCHS))
    an_epoch = _steps_of_an_epoch(run.recipe)
    return math.ceil(training["max_steps"] / an_epoch) if an_epoch else None


def steps_of(run: Run) -> int | None:
    """Optimizer steps: max_steps, or epochs over the rows that `prepare` counted; None if neither is known."""
    training = run.recipe.training
    if training.get("max_steps", -1) > 0:
        return training["max_steps"]
    an_epoch = _steps_of_an_epoch(run.recipe)
    return None if an_epoch is None else math.ceil(an_epoch * training.get("num_train_epochs", EPOCHS))


def _steps_of_an_epoch(recipe: Recipe) -> int | None:
    try:
        report = _prepares_report(recipe)
        same = report["max_length"] == recipe.max_length and report["packing"] == recipe.packing
        rows = report["packed_rows"] if same else _rows(report, recipe)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return math.ceil(rows / recipe.global_batch_size)


def example_of_a_token(recipe: Recipe) -> float:
    """Tokens of a token's example, on average over tokens: what attention's time goes by.

    Where rows are packed, from `prepare`'s histogram of their lengths; else, or without a report, a whole row's.
    """
    if not recipe.packing:
        return recipe.max_length
    try:
        lengths = _prepares_report(recipe)["tokens"]["histogram"]
        examples = [(0.75 * int(edge), count) for edge, count in lengths.items()]  # a bin begins at half its edge
        tokens = sum(length * count for length, count in examples)
        return min(recipe.max_length, sum(length**2 * count for length, count in examples) / tokens)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return recipe.max_length


def _prepares_report(recipe: Recipe) -> dict:
    """Raises OSError or ValueError where there is none that can be read."""
    return json.loads((Path(recipe.data.prepared) / "report.json").read_text(encoding="utf-8"))


def _rows(report: dict, recipe: Recipe) -> float:
    """Rows at another length than `prepare` counted for, by the tokens, packed as well as it found."""
    if not recipe.packing:
        return report["train_rows"]
    return report["tokens"]["total"] / (recipe.max_length * (report["packing_efficiency"] or 1))
