"""`eval` on a model's or an adapter's folder, and on other rows: the figures that it gives for the run itself."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from ranks import run_ranks, train_here
from rounding import additions_to_logits, rounding
from transformers import LlamaConfig

from fitune.cli import cli
from fitune.config import run as runs
from fitune.config.recipe import Data
from fitune.data.prepare import prepare
from fitune.errors import UsageError
from fitune.export.merge import merge_run
from fitune.training.evaluate import evaluate
from fitune.training.evaluate_folder import evaluate_folder
from fitune.training.given_model import given_model


def train_and_evaluate(run, other: Path) -> None:
    train_here(run)
    evaluate(run)
    evaluate(run, data=other)


@pytest.fixture(scope="module")
def other_rows(prepared, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "others"
    folder.mkdir()
    lines = (prepared / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "test.jsonl").write_text("".join(lines[:5]))
    return folder


@pytest.fixture(scope="module", params=["lora", "full"])
def run(request, tiny_base, make_run, other_rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "run"
    training = {"max_steps": 2, "learning_rate": 1e-2}
    made = make_run(tiny_base, folder, request.param, training=training, chat_template="llama3")
    run_ranks(train_and_evaluate, 1, made, other_rows)
    return made


def reported(run, name: str = "eval.json") -> dict:
    return json.loads((run.folder / name).read_text())


def assert_same(found: dict, expected: dict, rounded: float) -> None:
    assert found["tokens"] == expected["tokens"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=rounded)


def test_a_results_folder_is_measured_as_its_run_was(run, tiny_base, prepared):
    found = evaluate_folder(given_model(run.result_folder), prepared)
    rounded = rounding(additions_to_logits(LlamaConfig.from_pretrained(tiny_base), 256))
    assert found["rows"] == reported(run)["rows"] == 8
    assert_same(found["model"], reported(run)["tuned"], rounded)
    assert abs(reported(run)["base"]["loss"] - found["model"]["loss"]) > 100 * rounded


def test_a_merged_model_is_too_up_to_its_rounding(run, prepared, tmp_path):
    found = evaluate_folder(given_model(merge_run(run, tmp_path / "merged")), prepared)
    assert_same(found["model"], reported(run)["tuned"], 0.01)


def test_other_rows_are_measured_and_reported_by_name(run, tiny_base, other_rows):
    found = evaluate_folder(given_model(run.result_folder), other_rows / "test.jsonl")
    report = reported(run, "eval-others.json")
    assert found["rows"] == report["rows"] == 5
    rounded = rounding(additions_to_logits(LlamaConfig.from_pretrained(tiny_base), 256))
    assert_same(found["model"], report["tuned"], rounded)
    assert reported(run)["tuned"]["loss"] != report["tuned"]["loss"]


def test_other_rows_that_cannot_be_measured_are_refused_before_processes_start(run, tmp_path, monkeypatch):
    monkeypatch.setattr("fitune.launching.roll_call.launch_until_stopped", lambda *_, **__: pytest.fail("started"))
    (run.folder / "run.yaml").write_text(runs.dump(run))
    for lines, said in ((None, "no such file; give a folder that prepare wrote, with held-out rows"), ("", "no rows")):
        if lines is not None:
            (tmp_path / "test.jsonl").write_text(lines)
        outcome = CliRunner().invoke(cli, ["eval", str(run.folder), "--data", str(tmp_path)])
        assert outcome.exit_code == 2 and f"{tmp_path / 'test.jsonl'}: {said}" in outcome.stderr, outcome.output


def test_of_prepared_rows_the_answers_count_that_were_chosen(run, tmp_path):
    """`train_on`, which the folder's report says; of a file by itself all."""
    turns = [{"role": role, "content": text} for text in "abcdefghijklmnop" for role in ("user", "assistant")]
    rows = [{"messages": turns[start : start + 4]} for start in range(0, 32, 4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = {}
    for train_on in ("all", "last"):
        data = Data(dataset=str(tmp_path / "rows.jsonl"), prepared="unused", train_on=train_on, test_fraction=0.5)
        tokenizer = given_model(run.result_folder).tokenizer()
        prepare(data, tmp_path / train_on, tokenizer=tokenizer, template_choice="tokenizer")
        counts[train_on] = evaluate_folder(given_model(run.result_folder), tmp_path / train_on)["model"]["tokens"]
    assert counts["all"] == 2 * counts["last"] > 0
    alone = Path(shutil.copy(tmp_path / "last" / "test.jsonl", tmp_path / "test.jsonl"))
    assert evaluate_folder(given_model(run.result_folder), alone)["model"]["tokens"] == counts["all"]


def test_evaluation_renews_the_card(run):
    assert f"| tuned | {reported(run)['tuned']['loss']:.4f} |" in (run.result_folder / "README.md").read_text()


def test_what_cannot_be_measured_is_refused(run, prepared, tmp_path):
    outcome = CliRunner().invoke(cli, ["eval", str(run.result_folder)])
    assert outcome.exit_code == 2
    assert "no run, so it knows no held-out rows: give --data FOLDER" in outcome.stderr
    with pytest.raises(UsageError, match=r"test.jsonl: no such file; give a folder that prepare wrote"):
        evaluate_folder(given_model(run.result_folder), tmp_path)
    bare = Path(shutil.copytree(run.result_folder, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    outcome = CliRunner().invoke(cli, ["eval", str(bare), "--data", str(prepared)])
    assert outcome.exit_code == 2
    assert "bare: has no chat template, as base models have none; without one, answers cannot be told" in outcome.stderr
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": []}\n')
    with pytest.raises(UsageError, match=r"bad.jsonl:1"):
        evaluate_folder(given_model(run.result_folder), bad)
    bad.write_text("")
    with pytest.raises(UsageError, match="no row has an answer"):
        evaluate_folder(given_model(run.result_folder), bad)


def test_there_must_be_room_for_the_longest_row(run, prepared, tmp_path, monkeypatch):
    """Not for a conversation, as where answers are asked for: rows may be longer, or all of them short."""
    checked = []
    monkeypatch.setattr("fitune.training.model_run.how_to_hold", lambda *_, reading, **__: checked.append(reading))
    monkeypatch.setattr("fitune.training.evaluate_folder.print_evaluation", lambda given, tokens: None)
    long = tmp_path / "long.jsonl"
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "answer " * 6000}]
    long.write_text((prepared / "test.jsonl").read_text() + json.dumps({"messages": turns}) + "\n")
    for rows in (prepared / "test.jsonl", long):
        outcome = CliRunner().invoke(cli, ["eval", str(run.result_folder), "--data", str(rows)], catch_exceptions=False)
        assert outcome.exit_code == 0, outcome.output
    short, longest = checked
    assert short.tokens < 512 and longest.tokens > 6000 and not (short.answers or longest.answers)


BAD_TEMPLATES = {
    "{% if %}": "not a working template: Expected an expression",
    "{{ raise_exception('no') }}": "not a working template: no",
    "{% for m in messages %}{{ m.content }}{% endfor %}": "leaves the end of the turn out of the answer; put {%",
}


@pytest.mark.parametrize("template", BAD_TEMPLATES)
def test_a_bad_chat_template_is_refused_before_processes_start(run, template, prepared, tmp_path, monkeypatch):
    """`generate` writes questions alone, so the third is good enough for it."""
    folder, started = Path(shutil.copytree(run.result_folder, tmp_path / "bad")), []
    (folder / "chat_template.jinja").write_text(template)
    for module in ("eval_command", "generate_command"):
        monkeypatch.setattr(f"fitune.training.{module}.launch_until_stopped", lambda *_, **__: started.append(1) or 0)
    measured = CliRunner().invoke(cli, ["eval", str(folder), "--load", "nf4", "--data", str(prepared)])
    assert measured.exit_code == 2 and not started
    assert f"{folder}: its chat template: " in measured.stderr and BAD_TEMPLATES[template] in measured.stderr
    assert "chat_template:" not in measured.stderr, "there is no recipe in which that key could be changed"
    asked = CliRunner().invoke(cli, ["generate", str(folder), "--load", "nf4", "--prompt", "Hi"])
    if template.startswith("{% for"):
        assert asked.exit_code == 0 and started
    else:
        assert asked.exit_code == 2 and not started and asked.stderr.count("\n") == 1
        assert f"{folder}: its chat template cannot write a question: " in asked.stderr
