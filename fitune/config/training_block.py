"""Checks a recipe's `training:` block against TRL's SFTConfig, so that nothing is refused after a model was loaded."""

import math
import re
from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fitune.config.evaluation import refuse_unfit_evaluation
from fitune.config.hints import meant_by
from fitune.config.installed_names import sft_config_fields, training_enums
from fitune.config.optimizers import ARGUMENTS as WORKING_OPTIMIZERS
from fitune.config.optimizers import refuse_unfit_optimizer
from fitune.config.recipe import Recipe
from fitune.config.schedules import ARGUMENTS as WORKING_SCHEDULES
from fitune.config.schedules import refuse_unfit_schedule
from fitune.config.trackers import refuse_missing_trackers
from fitune.config.training_fields import CHOICES, LIMITS, NEEDS_WORKERS, OWNED_ELSEWHERE, REFUSED
from fitune.config.yaml_file import Where, place_of
from fitune.errors import UsageError, nearest

WORKING = {"optim": WORKING_OPTIMIZERS, "lr_scheduler_type": WORKING_SCHEDULES}
"Of what transformers knows, what a run may have."
PLAIN_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "None": "null"}


def check_training_block(recipe: Recipe, source: str | Where) -> dict[str, Any]:
    """The block with values converted to their fields' types. Raises UsageError, the place in `source` named.

    What one value can be wrong with comes first, then what several together cannot do or would ignore.
    """
    training = {
        name: _checked(name, value, place_of(source, ["training", name])) for name, value in recipe.training.items()
    }
    stopping = place_of(source, ["early_stopping"])
    source = place_of(source, ["training"])
    refuse_unfit_optimizer(training, source)
    refuse_unfit_schedule(training, source)
    refuse_missing_trackers(training, source)
    refuse_unfit_evaluation(training, recipe.early_stopping, source, stopping)
    for name in NEEDS_WORKERS:
        if training.get(name) and not training.get("dataloader_num_workers"):
            raise UsageError(f"{source}: training.{name} needs training.dataloader_num_workers=1 or more")
    return training


def taken_away(training: dict[str, Any], blocks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`training` without the fields that are null and have a value in one of the `blocks` that it is made of.

    Null stays where it is a value of the field, and where there is none to take away: that is refused.
    """
    fields = sft_config_fields()

    def stays(name: str, value: Any) -> bool:
        takes_null = re.search(r"\bNone\b", fields.get(name, ""))
        return value is not None or takes_null or all(block.get(name) is None for block in blocks)

    return {name: value for name, value in training.items() if stays(name, value)}


def refuse_what_needs_a_gpu(training: dict[str, Any], *, use_cpu: bool) -> None:
    """Raises UsageError for a field that a run on the CPU would ignore, or end with."""
    for name in ("tf32", "torch_empty_cache_steps"):
        if use_cpu and training.get(name) is not None:
            raise UsageError(f"training.{name} is for GPUs, and this run trains on the CPU; remove it")


def _checked(name: str, value: Any, source: str) -> Any:
    fields = sft_config_fields()
    if name in OWNED_ELSEWHERE:
        raise UsageError(f"{source}: training.{name} is not set here: {OWNED_ELSEWHERE[name]}")
    if name in REFUSED:
        raise UsageError(f"{source}: training.{name} cannot be set: {REFUSED[name]}")
    if name not in fields:
        hint = meant_by(f"training.{name}") or nearest(name, fields, within="training.")
        raise UsageError(f"{source}: training.{name} is not a field of TRL's SFTConfig{hint}")
    value = _convert(name, value, fields[name], source)
    _check_limits(name, value, source)
    is_count = name.endswith("_steps") and isinstance(value, float) and value.is_integer()
    return int(value) if is_count else value  # a float to TRL, which may be a share of all steps; run.yaml has 50


def _convert(name: str, value: Any, annotation: str, source: str) -> Any:
    plain_types = {"int": int, "float": float, "bool": bool, "str": str, "None": type(None)}
    parts = [part.strip() for part in re.split(r"\|", annotation)]
    for allowed in (training_enums()[part] for part in parts if part in training_enums()):
        value = "no" if value is False and "no" in allowed else value  # what YAML reads in `save_strategy: no`
        if value not in allowed:
            hint = nearest(str(value), WORKING.get(name, allowed))
            raise UsageError(f"{source}: training.{name}: unknown value {value!r}{hint}")
    if not all(part in plain_types for part in parts):
        return value  # containers: the checks of each field
    if value is None and "None" not in parts:
        raise UsageError(f"{source}: training.{name} has no value; give one, or remove it")
    kinds = [plain_types[part] for part in parts]
    if type(value) in kinds or (value is None and type(None) in kinds):
        return value
    for kind in kinds if type(value) is not bool else []:  # which is 0 or 1 to Python
        try:
            return TypeAdapter(kind).validate_python(value)
        except ValidationError:
            continue
    if str in kinds and type(value) in (int, float):
        return str(value)
    expected = " or ".join(PLAIN_WORDS[part] for part in parts)
    raise UsageError(f"{source}: training.{name}: {value!r} is not {expected}")


def _check_limits(name: str, value: Any, source: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{source}: training.{name}: {value} is not a finite number")
    holds, words = LIMITS.get(name, (None, ""))
    if holds and isinstance(value, (int, float)) and not holds(value):
        raise UsageError(f"{source}: training.{name}: {value} is not {words}")
    allowed = CHOICES.get(name)
    if allowed and value is not None and value not in allowed:
        raise UsageError(f"{source}: training.{name}: unknown value {value!r}{nearest(str(value), allowed)}")
