"""Fields of `training:` that another of its fields makes meaningless: asked for together, one would be ignored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fitune.config.yaml_file import Where, place_of
from fitune.errors import UsageError


@dataclass(frozen=True)
class Rule:
    """`field` says nothing where `other` is as `ignores` describes it; `instead` is what works."""

    field: str
    other: str
    ignores: Callable[[Any], bool]
    instead: str
    default: Any
    "Of `other`, where it is not set."


def _not_steps(strategy: str) -> bool:
    return strategy != "steps"


RULES = (
    Rule("num_train_epochs", "max_steps", lambda steps: steps > 0, "training.max_steps=-1", -1),
    Rule("logging_steps", "logging_strategy", _not_steps, "training.logging_strategy=steps", "steps"),
    Rule("eval_steps", "eval_strategy", lambda value: value == "epoch", "training.eval_strategy=steps", "no"),
    Rule("save_steps", "save_strategy", _not_steps, "training.save_strategy=steps", "steps"),
    Rule("save_total_limit", "save_strategy", lambda value: value == "no", "training.save_strategy=steps", "steps"),
    Rule(
        *("warmup_steps", "lr_scheduler_type", lambda name: name in ("constant", "reduce_lr_on_plateau")),
        *("training.lr_scheduler_type=constant_with_warmup", "linear"),
    ),
)


def refuse_ignored(training: dict[str, Any], layers: Sequence[dict[str, Any]], source: str | Where) -> None:
    """Raises UsageError for a field that would be ignored.

    `layers` are the `training:` blocks that `training` was made of, the one that overrules all others first. Where a
    layer makes a field of a later one meaningless, it overrules that, and nobody is told.
    """

    def layer_of(name: str) -> int:
        return next((number for number, block in enumerate(layers) if name in block), len(layers))

    for rule in RULES:
        other, layer = training.get(rule.other, rule.default), layer_of(rule.field)
        is_asked_for = layer < len(layers) and layer <= layer_of(rule.other)
        if is_asked_for and training.get(rule.field) and rule.ignores(other):
            raise UsageError(
                f"{place_of(source, ['training', rule.field])}: training.{rule.field} would be ignored beside "
                f"training.{rule.other}={other}; set {rule.instead}, or remove one of them"
            )
