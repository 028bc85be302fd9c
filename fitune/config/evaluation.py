"""What a recipe says about evaluations while it trains: when, by which number the best is chosen, when it is enough."""

from typing import Any

from fitune.config.recipe import EarlyStopping, Recipe
from fitune.errors import UsageError, nearest

METRICS = ("loss", "perplexity", "token_accuracy")
"What an evaluation measures; logged as eval_loss and so on, as in eval.json."
LARGER_IS_BETTER = {"token_accuracy"}
NEEDS_EVALUATIONS = ("eval_steps", "eval_delay", "eval_on_start", "load_best_model_at_end", "metric_for_best_model")
"Fields that say nothing where `eval_strategy` is no."
SCHEDULES_THAT_LOOK = ("reduce_lr_on_plateau", "greedy")
"Learning rates that follow the evaluations."


def is_evaluated(training: dict[str, Any]) -> bool:
    return training.get("eval_strategy", "no") != "no"


def best_metric(training: dict[str, Any]) -> str:
    """The one of METRICS by which models are compared."""
    return str(training.get("metric_for_best_model") or "loss").removeprefix("eval_")


def scores(training: dict[str, Any], log_history: list[dict]) -> dict[int, float]:
    """Of each step that was evaluated, by what a trainer logged: less is better.

    The model before the first step is not among them: it has no checkpoint.
    """
    metric = best_metric(training)
    key, sign = f"eval_{metric}", -1 if metric in LARGER_IS_BETTER else 1
    return {entry["step"]: sign * entry[key] for entry in log_history if key in entry and entry["step"]}


def stops_early(recipe: Recipe, log_history: list[dict]) -> bool:
    """Whether `early_stopping.patience` evaluations in a row brought nothing better."""
    if recipe.early_stopping is None:
        return False
    best, in_vain = float("inf"), 0
    for _, score in sorted(scores(recipe.training, log_history).items()):
        better = score < best - recipe.early_stopping.threshold
        best, in_vain = (score, 0) if better else (best, in_vain + 1)
    return in_vain >= recipe.early_stopping.patience


def saves_the_best_only(training: dict[str, Any]) -> bool:
    return training.get("save_strategy") == "best"


def keeps_the_best(training: dict[str, Any]) -> bool:
    """Whether an evaluation better than all before is saved at once."""
    return bool(training.get("load_best_model_at_end")) or saves_the_best_only(training)


def best_model_fields(training: dict[str, Any]) -> dict[str, Any]:
    """Fields of SFTConfig as transformers must see them: choosing, saving and loading the best is fitune's work.

    transformers takes a perplexity for the better the larger it is, and knows no sharded model to load.
    """
    metric = best_metric(training)
    larger_is_better = metric in LARGER_IS_BETTER
    fields = {
        "load_best_model_at_end": False,
        "metric_for_best_model": metric,
        "greater_is_better": larger_is_better,
    }
    if saves_the_best_only(training):
        fields["save_strategy"] = "no"
    if training.get("lr_scheduler_type") == "reduce_lr_on_plateau":
        mode = {"mode": "max" if larger_is_better else "min"}
        fields["lr_scheduler_kwargs"] = mode | (training.get("lr_scheduler_kwargs") or {})
    return fields


def refuse_unfit_evaluation(
    training: dict[str, Any], early_stopping: EarlyStopping | None, source: str, stopping_source: str
) -> None:
    """Raises UsageError for settings about evaluations that could have no effect or that cannot be followed.

    The last two are where `training` and `early_stopping` stand.
    """
    metric = best_metric(training)
    if metric not in METRICS:
        raise UsageError(
            f"{source}: training.metric_for_best_model: unknown metric {metric!r}{nearest(metric, METRICS)}"
        )
    if not is_evaluated(training):
        wanting = [f"training.{name}" for name in NEEDS_EVALUATIONS if training.get(name)]
        wanting += [f"training.{name}={training[name]}" for name in ("lr_scheduler_type",) if _looks(training)]
        wanting += ["training.save_strategy=best"] if saves_the_best_only(training) else []
        wanting += ["early_stopping"] if early_stopping else []
        if wanting:
            place = stopping_source if wanting == ["early_stopping"] else source
            raise UsageError(
                f"{place}: {wanting[0]} needs evaluations; set training.eval_strategy to steps or epoch as well"
            )
        return
    if training.get("metric_for_best_model") and not (early_stopping or keeps_the_best(training) or _looks(training)):
        raise UsageError(
            f"{source}: training.metric_for_best_model would change nothing; set training.load_best_model_at_end=true, "
            f"training.save_strategy=best or early_stopping as well"
        )
    if training.get("load_best_model_at_end") and training.get("save_strategy") == "no":
        raise UsageError(
            f"{source}: training.load_best_model_at_end loads a checkpoint, and training.save_strategy=no saves none; "
            f"set it to best, steps or epoch"
        )
    every, steps = _evaluated_every(training), training.get("max_steps", -1)
    if 0 < steps < every:
        raise UsageError(
            f"{source}: training.eval_steps {every:g} is beyond training.max_steps {steps}: nothing would be evaluated"
        )


def _looks(training: dict[str, Any]) -> bool:
    return training.get("lr_scheduler_type") in SCHEDULES_THAT_LOOK


def _evaluated_every(training: dict[str, Any]) -> float:
    """Steps; 0 where it is not a number of steps. transformers falls back to logging_steps, whose default is 10."""
    if training.get("eval_strategy") != "steps":
        return 0
    return training.get("eval_steps") or training.get("logging_steps", 10)
