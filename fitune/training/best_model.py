"""The best of a run's evaluations: its checkpoint is kept and becomes the result, and training may end early.

All is read from the trainer's log, which every checkpoint holds: a run that is resumed decides as one that was not.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback

from fitune.config.evaluation import LARGER_IS_BETTER, best_metric, keeps_the_best
from fitune.config.recipe import Recipe
from fitune.errors import say_while_training
from fitune.training.distributed import is_main_process


class BestModel(TrainerCallback):
    """Saves after an evaluation that is better than all before, and ends training that no longer gets better."""

    def __init__(self, recipe: Recipe):
        self.is_result = bool(recipe.training.get("load_best_model_at_end"))
        "Whether the best becomes the run's result, not the last."
        self.is_saved = keeps_the_best(recipe.training)
        self.metric = best_metric(recipe.training)
        self.early_stopping = recipe.early_stopping

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step in self.kept_steps(state.log_history):
            control.should_save = True
        if self.stops_early(state.log_history):
            control.should_save = control.should_training_stop = True
            if is_main_process():
                patience = self.early_stopping.patience
                in_vain = "1 evaluation" if patience == 1 else f"{patience} evaluations in a row"
                say_while_training(f"stopped early after step {state.global_step}: {in_vain} brought nothing better")

    def best_steps(self, log_history: list[dict]) -> list[int]:
        """Steps that were evaluated, the best first; of equals the earlier."""
        scores = self._scores(log_history)
        return sorted(scores, key=lambda step: (scores[step], step))

    def kept_steps(self, log_history: list[dict]) -> list[int]:
        """The step whose checkpoint is made, and stays, because it was the best so far; none where nobody asks."""
        return self.best_steps(log_history)[:1] if self.is_saved else []

    def stops_early(self, log_history: list[dict]) -> bool:
        """Whether `early_stopping.patience` evaluations in a row brought nothing better."""
        if self.early_stopping is None:
            return False
        best, in_vain = float("inf"), 0
        for _, score in sorted(self._scores(log_history).items()):
            better = score < best - self.early_stopping.threshold
            best, in_vain = (score, 0) if better else (best, in_vain + 1)
        return in_vain >= self.early_stopping.patience

    def _scores(self, log_history: list[dict]) -> dict[int, float]:
        """Less is better. The model before the first step is not among them: it has no checkpoint."""
        key, sign = f"eval_{self.metric}", -1 if self.metric in LARGER_IS_BETTER else 1
        return {entry["step"]: sign * entry[key] for entry in log_history if key in entry and entry["step"]}

    def choose(self, folder: Path, log_history: list[dict], find_damage: Callable[[Path], str | None]) -> Path | None:
        """The best whole checkpoint in `folder`; None if no step with a checkpoint was evaluated. Says what it takes.

        Call on all ranks.
        """
        for step in self.best_steps(log_history):
            checkpoint = folder / f"checkpoint-{step}"
            damage = find_damage(checkpoint)
            if is_main_process():
                score = abs(self._scores(log_history)[step])
                verdict = f"skipped: {damage}" if damage else "the best evaluation, becomes the result"
                print(f"{checkpoint.name}: {self.metric} {score:.4f}: {verdict}", file=sys.stderr)
            if not damage:
                return checkpoint
        if is_main_process():
            print("note: no checkpoint was evaluated; the last step becomes the result", file=sys.stderr)
        return None
