"""`eval --tasks` around lm-eval, for which a stand-in answers."""

import json

import pytest
from click.testing import CliRunner

from fitune.cli import cli

LM_EVAL = """
def simple_evaluate(model, model_args, tasks, limit, **options):
    import pathlib
    assert model == "hf" and pathlib.Path(model_args["pretrained"], "config.json").is_file()
    merged = pathlib.Path(model_args["pretrained"]).name == "model"
    values = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": "N/A", "merged,none": float(merged)}
    values["limit,none"] = limit
    return {"results": {task: values for task in tasks}}
"""
TASKS = """
class TaskManager:
    def __init__(self, include_path=None):
        self.all_tasks = ["hellaswag", *(["mine"] if include_path else [])]
"""


@pytest.fixture
def lm_eval(tmp_path, monkeypatch):
    folder = tmp_path / "site" / "lm_eval"
    (folder / "tasks").mkdir(parents=True)
    (folder / "__init__.py").write_text(LM_EVAL)
    (folder / "tasks" / "__init__.py").write_text(TASKS)
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        del sys.modules[name]


def evaluate(*words):
    return CliRunner().invoke(cli, ["eval", *map(str, words)])


def test_a_models_folder_is_measured_as_it_is(lm_eval, tiny_base, tmp_path):
    file = tmp_path / "tasks.json"
    words = ("--tasks", "hellaswag,mine", "--include", tmp_path, "--limit", "3", "--json", file)
    outcome = evaluate(tiny_base, *words)
    assert outcome.exit_code == 0, outcome.output
    expected = {"acc": 0.5, "merged": 0.0, "limit": 3}
    assert json.loads(file.read_text()) == {"hellaswag": expected, "mine": expected}
    assert "0.5000" in outcome.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tasks", "helaswag"), "--tasks helaswag: lm-eval has no such task; did you mean 'hellaswag'?"),
        (("--tasks", "hellaswag", "--include", "/nowhere"), "--include /nowhere: no such folder"),
    ],
    ids=["task", "folder"],
)
def test_unknown_tasks_are_refused_first(lm_eval, tiny_base, words, said):
    outcome = evaluate(tiny_base, *words)
    assert outcome.exit_code == 2 and said in outcome.stderr


def test_without_lm_eval_one_line_says_how_to_install_it(tiny_base, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    outcome = evaluate(tiny_base, "--tasks", "hellaswag")
    assert outcome.exit_code == 2
    assert outcome.stderr == 'error: eval --tasks uses lm-eval: pip install "lm_eval[hf]"\n'


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tasks", "hellaswag", "--data", "rows.jsonl"), "--data is for held-out rows; lm-eval's tasks bring"),
        (("--tasks", "hellaswag", "--load", "nf4"), "--load is for held-out rows; lm-eval's tasks bring"),
        (("--tasks", "hellaswag", "--machine-rank", "0"), "one machine does this alone; leave out --machine-rank"),
        (("--data", "rows.jsonl", "--limit", "3"), "--limit is for lm-eval's tasks: add --tasks NAME"),
        (("--data", "rows.jsonl", "--json", "out.json"), "--json is for lm-eval's tasks: add --tasks NAME"),
        (("--data", "rows.jsonl", "--machine-rank", "0"), "one machine does this alone; leave out --machine-rank"),
    ],
    ids=["data", "load", "machine beside tasks", "limit", "json", "machine"],
)
def test_a_flag_that_would_do_nothing_is_refused(tiny_base, words, said):
    outcome = evaluate(tiny_base, *words)
    assert outcome.exit_code == 2 and said in outcome.stderr
