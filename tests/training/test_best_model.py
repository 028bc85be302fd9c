"""Which evaluation is the best, and when there were enough: read from a log alone."""

import pytest
from transformers import TrainerControl, TrainerState

from fitune.config.evaluation import stops_early
from fitune.config.recipe import EarlyStopping
from fitune.launching.finished import noted_best
from fitune.training.best_model import BestModel


@pytest.fixture
def best_model(make_run, tiny_base, tmp_path):
    """BestModel of a recipe that compares by `metric` and stops early with `stopping`."""

    def make(metric: str = "loss", **stopping) -> BestModel:
        training = {"eval_strategy": "steps", "load_best_model_at_end": True, "metric_for_best_model": metric}
        options = {"early_stopping": EarlyStopping(**stopping).model_dump()} if stopping else {}
        return BestModel(make_run(tiny_base, tmp_path, "lora", training=training, **options).recipe)

    return make


def log(*scores: float, metric: str = "loss", first_step: int = 1) -> list[dict]:
    """A trainer's log with an evaluation at each step, among other lines."""
    lines = [{"step": step, "loss": 1.0} for step in range(1, len(scores) + 1)]
    return lines + [{"step": step, f"eval_{metric}": score} for step, score in enumerate(scores, first_step)]


def test_a_loss_is_better_small_and_an_accuracy_large(best_model):
    assert best_model().best_steps(log(3, 1, 2)) == [2, 3, 1]
    accuracies = log(0.3, 0.1, 0.2, metric="token_accuracy")
    assert best_model("token_accuracy").best_steps(accuracies) == [1, 3, 2]
    assert best_model("perplexity").best_steps(log(3, 1, 2, metric="perplexity")) == [2, 3, 1]


def test_of_equals_the_earlier_is_the_better(best_model):
    assert best_model().best_steps(log(2, 1, 1)) == [2, 3, 1]
    assert best_model().kept_steps(log(2, 1, 1)) == [2]


def test_the_model_before_the_first_step_is_not_among_them(best_model):
    assert best_model().best_steps(log(0.5, 2, 1, first_step=0)) == [2, 1]


@pytest.mark.parametrize(
    ("scores", "stops"),
    [
        ((3, 2), False),
        ((3, 4), False),
        ((3, 4, 4), True),
        ((3, 4, 2, 4), False),  # in a row
        ((3, 4, 2, 4, 3), True),
        ((3, 3, 3), True),  # as good is no better
    ],
)
def test_as_many_evaluations_in_vain_as_patience_says_end_it(best_model, scores, stops):
    assert stops_early(best_model(patience=2).recipe, log(*scores)) is stops
    assert not stops_early(best_model().recipe, log(*scores)), "nobody asked for it"


def test_it_is_said_once_and_what_was_trained_is_saved(best_model, capsys):
    model, control = best_model(patience=2), TrainerControl()
    for scores in ((3,), (3, 4), (3, 4, 4)):
        assert not control.should_training_stop and "stopped early" not in capsys.readouterr().err
        state = TrainerState(global_step=len(scores), max_steps=9, log_history=log(*scores))
        model.on_evaluate(None, state, control)
    assert control.should_training_stop and control.should_save
    assert "stopped early after step 3: 2 evaluations in a row brought nothing better" in capsys.readouterr().err
    model.on_evaluate(None, TrainerState(global_step=3, max_steps=3, log_history=log(3, 4, 4)), control)
    assert not capsys.readouterr().err, "it was the last step anyway"


def test_better_is_what_is_better_by_more_than_the_threshold(best_model):
    recipe = best_model(patience=2, threshold=0.5).recipe
    assert stops_early(recipe, log(3, 2.75, 2.5))
    assert not stops_early(recipe, log(3, 2.75, 2.25))
    assert stops_early(recipe, log(3, 2.25, 2, 1.875)), "than the best before it"


def test_the_step_that_becomes_the_result_is_noted_in_the_runs_folder(best_model, tmp_path):
    model, checkpoints = best_model(), tmp_path / "checkpoints"
    assert model.choose(checkpoints, log(3, 1, 2), lambda folder: None) == checkpoints / "checkpoint-2"
    assert noted_best(tmp_path) == 2
    model.choose(checkpoints, log(3, 1, 2), lambda folder: "damaged" if folder.name == "checkpoint-2" else None)
    assert noted_best(tmp_path) == 3
    assert model.choose(checkpoints, log(3, 1, 2), lambda folder: "damaged") is None
    assert noted_best(tmp_path) is None, "the last step becomes the result"
