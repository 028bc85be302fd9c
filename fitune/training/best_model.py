"""The best of a run's evaluations: its checkpoint is kept and becomes the result, and training may end early.

All is read from the trainer's log, which every checkpoint holds: a run that is resumed decides as one that was not.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback

from fitune.config.evaluation import best_metric, keeps_the_best, scores, stops_early
from fitune.config.recipe import Recipe
from fitune.errors import say_while_training
from fitune.launching.finished import note_best
from fitune.training.distributed import is_main_process


class BestModel(TrainerCallback):
    """Saves after an evaluation that is better than all before, and ends training that no longer gets better."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.is_result = bool(recipe.training.get("load_best_model_at_end"))
        "Whether the best becomes the run's result, not the last."
        self.is_saved = keeps_the_best(recipe.training)

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step in self.kept_steps(state.log_history):
            control.should_save = True
        if stops_early(self.recipe, state.log_history):
            control.should_save = control.should_training_stop = True
            if is_main_process() and state.global_step < state.max_steps:
                patience = self.recipe.early_stopping.patience
                in_vain = "1 evaluation" if patience == 1 else f"{patience} evaluations in a row"
                say_while_training(f"stopped early after step {state.global_step}: {in_vain} brought nothing better")

    def best_steps(self, log_history: list[dict]) -> list[int]:
        """Steps that were evaluated, the best first; of equals the earlier."""
        found = scores(self.recipe.training, log_history)
        return sorted(found, key=lambda step: (found[step], step))

    def kept_steps(self, log_history: list[dict]) -> list[int]:
        """The step whose checkpoint is made, and stays, because it was the best so far; none where nobody asks."""
        return self.best_steps(log_history)[:1] if self.is_saved else []

    def choose(self, folder: Path, log_history: list[dict], find_damage: Callable[[Path], str | None]) -> Path | None:
        """The best whole checkpoint in `folder`; None if no step with a checkpoint was evaluated. Says what it takes.

        Notes its step in the run's folder, in which `folder` lies, for the model card and finished.json. Call on all
        ranks.
        """
        for step in self.best_steps(log_history):
            checkpoint = folder / f"checkpoint-{step}"
            damage = find_damage(checkpoint)
            if is_main_process():
                score = abs(scores(self.recipe.training, log_history)[step])
                verdict = f"skipped: {damage}" if damage else "the best evaluation, becomes the result"
                print(f"{checkpoint.name}: {best_metric(self.recipe.training)} {score:.4f}: {verdict}", file=sys.stderr)
            if not damage:
                if is_main_process():
                    note_best(folder.parent, step)
                return checkpoint
        if is_main_process():
            note_best(folder.parent, None)
            print("note: no checkpoint was evaluated; the last step becomes the result", file=sys.stderr)
        return None
