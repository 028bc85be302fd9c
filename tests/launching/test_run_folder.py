"""A run's folder: when it may be trained in, which settings stand in it, when the run is finished."""

import json
import shlex

import pytest
from click.testing import CliRunner
from results import ADAPTER, empty_adapter

from fitune.cli import cli
from fitune.config import run as runs
from fitune.config.run import resolve, resolve_again
from fitune.errors import UsageError
from fitune.launching.finished import Measuring, note_best, read_finished
from fitune.launching.launch import launch_line
from fitune.launching.run_folder import begin_to_train, finish, nothing_left, open_run_folder, settings_to_train
from fitune.launching.run_folder import steps_asked as asked
from fitune.training.given_run import finished_run


@pytest.fixture
def make(tmp_path):
    """A run of the tiny recipe in `tmp_path/run`, with `--set` flags."""
    return lambda *sets: resolve("tiny_qlora", "cpu_2proc", ("training.max_steps=4", *sets), str(tmp_path / "run"))


def saved(run, step: int) -> None:
    (run.folder / f"checkpoints/checkpoint-{step}").mkdir(parents=True)


def trained(run, step: int = 4) -> None:
    """As a run leaves its folder that has made `step` of its steps, an epoch each two."""
    with open_run_folder(run, resume=False):
        begin_to_train(run)
        saved(run, step)
    empty_adapter(run.result_folder)
    finish(run, step, step / 2)


def test_a_start_that_failed_does_not_block_the_corrected_command(make):
    with pytest.raises(ZeroDivisionError), open_run_folder(make("training.warmup_steps=1"), resume=False):
        (make().folder / "cache").mkdir()  # rows were read before it failed
        _ = 1 / 0
    with open_run_folder(make(), resume=False):
        assert runs.load(make().folder) == make()


@pytest.mark.parametrize("left", ["checkpoints/checkpoint-3", "adapter", "metrics.jsonl"])
def test_what_was_trained_is_not_overwritten(make, left):
    with open_run_folder(make(), resume=False):
        pass
    if left == "metrics.jsonl":
        (make().folder / left).write_text('{"step": 1}\n')
    else:
        (make().folder / left).mkdir(parents=True)
    with pytest.raises(UsageError, match="exists; add --resume to continue it, or choose another --output"):
        open_run_folder(make("seed=3"), resume=False).__enter__()
    assert runs.load(make().folder) == make()


def test_a_folder_of_something_else_is_left_alone(make):
    make().folder.mkdir()
    (make().folder / "letter.txt").touch()
    with pytest.raises(UsageError, match="exists and is not a run's folder; choose another --output"):
        open_run_folder(make(), resume=False).__enter__()
    with pytest.raises(UsageError, match=r"nothing to resume, run\.yaml is missing"):
        open_run_folder(make(), resume=True).__enter__()
    assert [path.name for path in make().folder.iterdir()] == ["letter.txt"]


def test_settings_of_a_resume_that_was_refused_leave_no_trace(make):
    trained(make())
    longer = make("training.max_steps=8")
    with open_run_folder(longer, resume=True):
        assert runs.load(settings_to_train(longer.folder)) == longer
        assert runs.load(longer.folder) == make(), "not before the first step"
    assert runs.load(settings_to_train(longer.folder)) == make()
    assert nothing_left(make()).startswith(f"{longer.folder} is finished after step 4")
    assert nothing_left(longer) is None


def test_a_resume_that_began_is_not_finished_by_the_result_before_it(make):
    """Killed before its next checkpoint, with the old checkpoint and the old result in the folder."""
    trained(make())
    longer = make("training.max_steps=8")
    with open_run_folder(longer, resume=True):
        begin_to_train(longer)
    assert runs.load(longer.folder) == longer
    assert nothing_left(longer) is None and nothing_left(make()) is None
    saved(longer, 8)  # killed while it wrote the result
    assert nothing_left(longer) is None
    finish(longer, 8, 4.0)
    assert "is finished after step 8" in nothing_left(longer)


def test_what_tells_of_a_result_is_not_taken_for_the_next_ones(make):
    """From the first step on; it is kept, as it took its time."""
    trained(make())
    for name in ("eval.json", "answers.json", "eval-theirs.json", "eval-checkpoint-2-theirs.json"):
        (make().folder / name).write_text("{}")
    measuring = Measuring(make().folder)
    assert measuring.file("eval") == make().folder / "eval.json" and measuring.is_the_results
    longer = make("training.max_steps=8")
    with open_run_folder(longer, resume=True):
        assert (longer.folder / "eval.json").is_file()
        begin_to_train(longer)
        begin_to_train(longer)  # after a crash
    measured = {path.name for path in longer.folder.glob("*.json")} - {"passed.json"}
    of_step_4 = {f"{name}-of-step-4.json" for name in ("eval", "answers", "eval-theirs")}
    assert measured == {*of_step_4, "eval-checkpoint-2-theirs.json"}
    assert measuring.file("eval") == longer.folder / "eval-of-step-4.json", "measured while training went on"
    assert measuring.file("eval-checkpoint-2") == longer.folder / "eval-checkpoint-2.json"
    finish(longer, 8, 4.0)
    assert measuring.file("eval").name == "eval-of-step-4.json" and not measuring.is_the_results
    assert not (longer.folder / "passed.json").exists()


def test_a_result_before_the_steps_that_were_trained_since_is_not_given_out(make):
    trained(make())
    assert finished_run(make().folder) == runs.load(make().folder)
    longer = make("training.max_steps=8")
    with open_run_folder(longer, resume=True):
        begin_to_train(longer)
    with pytest.raises(UsageError, match=r"went on after its result, of step 4, and has not finished: .*resume"):
        finished_run(longer.folder)
    finish(longer, 8, 4.0)
    assert finished_run(make().folder).recipe.training["max_steps"] == 8


def test_what_tells_of_the_best_evaluation_bears_its_step(make):
    """It is the result; training made more steps."""
    best_at_end = ("training.eval_strategy=epoch", "training.load_best_model_at_end=true")
    trained(make(*best_at_end))
    note_best(make().folder, 2)
    finish(make(*best_at_end), 4, 2.0)
    assert read_finished(make().folder)["step"] == 4 and read_finished(make().folder)["result_step"] == 2
    assert not (make().folder / "best.json").exists()
    (make().folder / "eval.json").write_text("{}")
    measuring, longer = Measuring(make().folder), make(*best_at_end, "training.max_steps=8")
    with open_run_folder(longer, resume=True):
        begin_to_train(longer)
    assert (make().folder / "eval-of-step-2.json").is_file()
    assert measuring.file("answers").name == "answers-of-step-2.json"
    with pytest.raises(UsageError, match=r"went on after its result, of step 2, and has not finished"):
        finished_run(longer.folder)


@pytest.mark.parametrize(("sets", "noted"), [((), 2), (("training.load_best_model_at_end=true",), 4)])
def test_a_result_of_the_last_step_has_no_step_of_its_own(make, sets, noted):
    """Noted before a crash, by settings that asked for the best; or the last is the best."""
    run = make("training.eval_strategy=epoch", *sets)
    trained(run)
    note_best(run.folder, noted)
    finish(run, 4, 2.0)
    assert "result_step" not in read_finished(run.folder) and not (run.folder / "best.json").exists()


def test_the_best_that_was_noted_before_a_crash_is_forgotten_when_training_goes_on(make):
    trained(make())
    note_best(make().folder, 2)
    with open_run_folder(make("training.max_steps=8"), resume=True):
        begin_to_train(make("training.max_steps=8"))
    assert not (make().folder / "best.json").exists()


def test_a_result_that_nothing_is_said_of_is_the_runs(make):
    """As of a run that was ended between its result and finished.json, or of an older version."""
    trained(make())
    (make().folder / "finished.json").unlink()
    (make().folder / "eval.json").write_text("{}")
    assert finished_run(make().folder) == runs.load(make().folder)
    with open_run_folder(make("training.max_steps=8"), resume=True):
        begin_to_train(make("training.max_steps=8"))
    assert (make().folder / "eval-of-an-earlier-result.json").is_file()


def test_a_run_that_stopped_early_goes_on_only_with_more_patience(make):
    evaluated, patience = "training.eval_strategy=epoch", "early_stopping.patience"
    run = make(evaluated, f"{patience}=2", "training.max_steps=6")
    with open_run_folder(run, resume=False):
        begin_to_train(run)
        saved(run, 3)
    losses = [{"step": step, "eval_loss": loss, "eval_token_accuracy": loss} for step, loss in ((1, 1), (2, 2), (3, 3))]
    state = run.folder / "checkpoints/checkpoint-3/trainer_state.json"
    state.write_text(json.dumps({"log_history": losses}))
    empty_adapter(run.result_folder)
    finish(run, 3, 1.5, stopped_early=True)
    assert "after step 3, where it stopped early: " in nothing_left(run)
    for changes in ((f"{patience}=2", "training.max_steps=9"), (f"{patience}=1",)):
        with pytest.raises(UsageError, match=r"to train longer, raise early_stopping\.patience; other changes"):
            nothing_left(make("training.max_steps=6", evaluated, *changes))
    with pytest.raises(UsageError, match=r"raise early_stopping\.patience and training\.max_steps; other changes"):
        nothing_left(make(evaluated, f"{patience}=2", "training.max_steps=3"))
    assert nothing_left(make(evaluated, f"{patience}=3", "training.max_steps=6")) is None
    better = "training.metric_for_best_model=token_accuracy"
    assert nothing_left(make(evaluated, f"{patience}=2", "training.max_steps=6", better)) is None


def test_the_line_that_starts_a_resume_names_what_it_asks_for(make):
    trained(make())
    assert shlex.split(launch_line(make(), "m"))[-2:] == ["m", str(make().folder / "run.yaml")]
    longer = make("training.max_steps=8")
    with open_run_folder(longer, resume=True):
        *_, config, _, _, settings = shlex.split(launch_line(longer, "m"))
        assert (config, settings) == tuple(str(make().folder / f"resume{name}.yaml") for name in ("-accelerate", ""))


def test_a_finished_run_goes_on_where_its_own_settings_were_given_more_steps(make):
    trained(make())
    file = make().folder / "run.yaml"
    for steps, goes_on in ((4, False), (3, False), (8, True)):
        file.write_text(file.read_text().replace("max_steps: 4", f"max_steps: {steps}"))
        run = resolve_again(make().folder)
        assert run.recipe.training["max_steps"] == steps
        assert (nothing_left(run) is None) == goes_on
        file.write_text(file.read_text().replace(f"max_steps: {steps}", "max_steps: 4"))


def test_a_run_that_stopped_early_is_finished(make):
    trained(make("training.max_steps=100"), step=4)
    run = resolve_again(make().folder)
    assert "is finished after step 4" in nothing_left(run)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("lora.r=5", r"started with lora\.r 64, not 5: not the same run"),
        ("training.optim=sgd", r"started with training\.optim adamw_torch_fused, not sgd"),
        ("seed=3", "started with seed 42, not 3"),
        ("training.weight_decay=0.3", r"started with training\.weight_decay 0\.0, not 0\.3"),
        ("training.learning_rate=1", "raise training.max_steps; other changes would have no effect"),
        ("training.max_steps=3", "other changes would have no effect"),
        ("training.max_steps=-1", "raise training.num_train_epochs; other changes"),  # 3 epochs are 6 steps
    ],
)
def test_a_finished_run_refuses_what_could_have_no_effect(make, changed, named):
    trained(make(), 4 if "-1" not in changed else 6)
    with pytest.raises(UsageError, match=named):
        nothing_left(make(changed))


def test_a_resume_that_is_only_shown_is_refused_as_one_that_starts(make):
    trained(make())
    words = ["train", "--resume", str(make().folder), "--dry-run"]
    assert CliRunner().invoke(cli, words).exit_code == 0
    refused = CliRunner().invoke(cli, [*words, "--set", "seed=3"])
    assert refused.exit_code == 2 and "was started with seed 42, not 3: not the same run" in refused.stderr


def test_what_to_type_instead_can_be_copied_whatever_the_folders_name(make, tmp_path):
    first, other = (run.model_copy(update={"output_dir": str(tmp_path / "my run")}) for run in (make(), make("seed=3")))
    trained(first)
    with pytest.raises(UsageError) as refused:
        nothing_left(other)
    assert shlex.split(str(refused.value).split("`")[1])[-3:] == ["train", "--resume", str(tmp_path / "my run")]


@pytest.mark.parametrize("lost", ADAPTER)
def test_a_run_whose_result_is_not_whole_is_not_finished(make, lost):
    trained(make())
    assert "is finished after step 4" in nothing_left(make())
    (make().result_folder / lost).unlink()
    assert nothing_left(make()) is None


def test_a_schedule_that_follows_evaluations_is_not_exchanged_on_the_way(make):
    evaluated, longer = "training.eval_strategy=epoch", "training.max_steps=8"
    follows = "training.lr_scheduler_type=reduce_lr_on_plateau"
    trained(make(evaluated))
    with pytest.raises(UsageError, match=r"lr_scheduler_type cosine, not reduce_lr_on_plateau: not the same run"):
        nothing_left(make(evaluated, longer, follows))
    assert nothing_left(make(evaluated, longer, "training.lr_scheduler_type=linear")) is None


@pytest.mark.parametrize(
    "changed",
    ["learning_rate=1e-5", "lr_scheduler_kwargs={factor: 0.2}", "metric_for_best_model=token_accuracy"],
)
def test_what_such_a_schedule_remembers_is_not_changed_on_the_way(changed, make):
    sets = ["training.eval_strategy=epoch", "training.lr_scheduler_type=reduce_lr_on_plateau"]
    trained(make(*sets))
    assert nothing_left(make(*sets, "training.max_steps=8")) is None
    with pytest.raises(UsageError, match=rf"started with training\.{changed.split('=')[0]} .*: not the same run"):
        nothing_left(make(*sets, "training.max_steps=8", f"training.{changed}"))


def test_states_are_those_that_checkpoints_hold(tmp_path):
    """However the run is resumed: by its recipe, or by its folder, before anything is written there."""
    small = ("training.max_steps=8", "profile.optimizer_state=bf16_8bit")
    trained(resolve("tiny_full", "cpu_2proc", ("training.max_steps=4",), str(tmp_path / "run")))
    by_recipe = resolve("tiny_full", "cpu_2proc", small, str(tmp_path / "run"))
    for run in (by_recipe, resolve_again(tmp_path / "run", None, small)):
        with pytest.raises(
            UsageError, match=r"fp32, which its checkpoints hold; use --set profile\.optimizer_state=fp32, or"
        ):
            open_run_folder(run, resume=True).__enter__()


def test_a_default_may_be_given_on_the_way(make):
    trained(make())
    same = ("training.optim=adamw_torch_fused", "training.weight_decay=0", "training.adam_beta2=0.999")
    assert nothing_left(make("training.max_steps=8", *same)) is None


def test_steps_asked_are_those_that_trainer_will_make():
    assert asked({"max_steps": 9}, 4, 2.0) == 9
    assert asked({}, 4, 2.0) == 6
    assert asked({"max_steps": -1, "num_train_epochs": 1.5}, 4, 4 / 7) == 11
    assert asked({"num_train_epochs": 1.5}, 11, 11 / 7) == 11


def test_a_runs_folder_is_continued_as_it_was_from_any_working_folder(make, tmp_path, monkeypatch):
    """And a relative path of run.yaml goes on to start where it was typed."""
    (tmp_path / "here/data").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = make("data.prepared=data", "training.learning_rate=0.5", "lora.r=8", "profile.micro_batch=1")
    trained(run)
    assert runs.load(run.folder).recipe.data.prepared == "data"
    assert resolve_again(run.folder) == run
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = resolve_again(run.folder, sets=("training.max_steps=9",))
    assert again.recipe.data.prepared == str(tmp_path / "here/data")
    assert again.recipe.training == run.recipe.training | {"max_steps": 9}
    assert (again.recipe.lora.r, again.profile.micro_batch) == (8, 1)
    with open_run_folder(again, resume=True):  # is the same run
        pass
    as_typed = make("data.prepared=../here/data", "lora.r=8", "training.max_steps=9")
    with open_run_folder(as_typed, resume=True):
        pass
    other = resolve_again(run.folder, "cpu_2proc", ("profile.kept_layers=1",))
    assert (other.profile.micro_batch, other.profile.kept_layers) == (2, 1)


def test_a_project_that_was_moved_keeps_its_relative_paths(make, tmp_path, monkeypatch):
    (tmp_path / "project/data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "project")
    run = resolve("tiny_qlora", "cpu_2proc", ("data.prepared=data",), "runs/mine")
    trained(run)
    (tmp_path / "project").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert resolve_again(tmp_path / "moved/runs/mine").recipe.data.prepared == "data"


def train(*words) -> tuple[int, str]:
    outcome = CliRunner().invoke(cli, ["train", *map(str, words)])
    return outcome.exit_code, outcome.output


def test_the_command_takes_a_runs_folder(make):
    run = make("training.learning_rate=0.5")
    trained(run)
    code, said = train("--resume", run.folder)
    assert code == 0 and said.startswith(f"{run.folder} is finished after step 4")
    code, said = train("--resume", run.folder, "--set", "training.max_steps=5", "--dry-run")
    assert code == 0 and "max_steps: 5" in said and "learning_rate: 0.5" in said
    assert train("--resume", run.folder, "--set", "training.max_step=5")[0] == 2
    code, said = train(run.folder)
    assert code == 2 and "is a run's folder: add --resume to continue it" in said
    code, said = train("--resume", run.folder, "--output", "elsewhere")
    assert code == 2 and "is continued in place: remove --output elsewhere" in said
    finished = {"step": 4, "epoch": 2.0, "asked": 4, "stopped_early": False}
    assert json.loads((run.folder / "finished.json").read_text()) == finished
