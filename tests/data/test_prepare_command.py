"""`prepare RECIPE --dataset FILE`, and that `train RECIPE` uses what it wrote or says what differs before it starts."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from preparing import chat, write
from results import empty_adapter

from fitune.config import run as runs
from fitune.config.schema import Run
from fitune.data.prepared import sha256_of_rows
from fitune.export.chat_record import ChatRecord, write_chat_record
from fitune.launching.run_folder import finish
from fitune.training.manifest import Identity, write_manifest

RECIPE = {
    "description": "A recipe for a dataset of its own.",
    "data": {
        "dataset": "SomeOne/something",
        "prepared": "data/theirs",
        "revision": "main",
        "train_split": "train_sft",
        "test_split": "test_sft",
        "format": "sharegpt",
        "columns": {"conversations": "dialog"},
        "invalid_rows": "drop",
        "mix": [{"dataset": "SomeOne/else"}],
        "system_message": "Be brief.",
        "chat_template": "llama3",
        "train_on": "last",
        "long_rows": "cut",
    },
    "method": "qlora",
    "lora": {"r": 4},
    "max_length": 60,
    "global_batch_size": 4,
    "training": {"max_steps": 1},
}


@pytest.fixture
def fitune(tiny_base, monkeypatch, tmp_path):
    """Runs a command line in a folder with recipe.yaml and the tiny base; what would be started goes to `started`."""
    from fitune.cli import cli
    from fitune.launching import launch, preflight
    from fitune.training import train_command

    started = []
    monkeypatch.setattr(train_command, "train_with_restarts", lambda run, **_: started.append(run) or 0)
    monkeypatch.setattr(launch, "launch", lambda run, module, *arguments, **_: started.append((module, arguments)) or 0)
    monkeypatch.setattr(preflight, "check_fits", lambda run: None)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_base, tmp_path / "base")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"base": {"model": "./base"}} | RECIPE))

    def call(*arguments):
        return CliRunner().invoke(cli, [str(argument) for argument in arguments])

    call.started = started
    return call


def train(fitune, *arguments):
    return fitune("train", "recipe.yaml", "--profile", "cpu_2proc", "--force", *arguments)


def refused(result) -> str:
    assert result.exit_code == 2, result.output
    [line] = [line for line in result.output.splitlines() if line.startswith("error: ")]
    return line


def test_what_to_type_next_can_be_copied_whatever_the_names(fitune, tmp_path):
    write(tmp_path / "mine.jsonl", *map(chat, range(8)))
    Path("my recipe.yaml").write_text(Path("recipe.yaml").read_text())
    result = fitune("prepare", "my recipe.yaml", "--dataset", "mine.jsonl", "--output", "data/it's new")
    typed = shlex.split(result.output.splitlines()[-1].removeprefix("next: "))
    assert typed[2:] == ["train", "my recipe.yaml", "--set", "data.prepared=data/it's new"]


@pytest.mark.parametrize(
    ("given", "typed"),
    [
        (["--set", "data.chat_template=plain"], ["data.chat_template=plain"]),
        (["--template", "plain", "--max-length", "99"], ["data.chat_template=plain", "max_length=99"]),
        (["--set", "max_length=99", "--set", "data.test_fraction=0.2"], ["max_length=99"]),
        (["--set", "data.prepared=data/new"], ["data.prepared=data/new"]),
        (["--set", "data.prepared=data/new", "--output", "data/newer"], ["data.prepared=data/newer"]),
        (["--set", "max_length=80", "--max-length", "90"], ["max_length=90"]),
    ],
)
def test_what_to_type_next_trains_as_was_prepared(given, typed, fitune, tmp_path):
    write(tmp_path / "mine.jsonl", *map(chat, range(8)))
    result = fitune("prepare", "recipe.yaml", "--dataset", "mine.jsonl", *given)
    assert result.exit_code == 0, result.output
    said = shlex.split(result.output.splitlines()[-1].removeprefix("next: "))
    assert said[2:] == ["train", "recipe.yaml", *(word for each in typed for word in ("--set", each))]
    assert fitune(*said[2:], "--profile", "cpu_2proc", "--dry-run").exit_code == 0


def test_a_length_that_no_training_would_take_is_refused_before_rows_are_read(fitune, tmp_path):
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    write(tmp_path / "mine.jsonl", *map(chat, range(8)))
    for flags in (["--max-length", "65"], ["--set", "max_length=65"]):
        line = refused(fitune("prepare", "recipe.yaml", "--dataset", "mine.jsonl", *flags))
        assert "max_length 65 is beyond the 64 positions of " in line
        assert not Path("data/theirs").exists()
    other = ["--tokenizer", str(shutil.copytree("base", "other"))]
    Path("base/config.json").write_text(json.dumps(config))
    assert fitune("prepare", "recipe.yaml", "--dataset", "mine.jsonl", *flags, *other).exit_code == 0, "not the base's"


def test_own_rows_are_prepared_as_the_recipe_says_and_trained_by_it(fitune, tmp_path):
    long = {"messages": [*chat(0)["messages"], *chat("long " * 60)["messages"]]}
    write(tmp_path / "mine.jsonl", *map(chat, range(1, 9)), long)
    result = fitune("prepare", "recipe.yaml", "--dataset", "mine.jsonl")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == "next: python cli.py train recipe.yaml"
    report = json.loads(Path("data/theirs/report.json").read_text())
    assert (report["rows_in"], report["rows_cut"], report["max_length"]) == (9, 1, 60)
    assert (report["source"]["dataset"], report["mixed_in"]) == ("mine.jsonl", [])
    row = json.loads(Path("data/theirs/train.jsonl").read_text().splitlines()[0])
    assert row["messages"][0] == {"role": "system", "content": "Be brief."}

    result = train(fitune)
    assert result.exit_code == 0, result.output
    assert "data: data/theirs, prepared from mine.jsonl" in result.output
    assert len(fitune.started) == 1


def test_own_rows_that_are_bad_are_named_though_the_recipe_drops_its_own(fitune, tmp_path):
    write(tmp_path / "mine.jsonl", chat(1), {"messages": []})
    assert (
        "mine.jsonl:2: no turn of the assistant" in fitune("prepare", "recipe.yaml", "--dataset", "mine.jsonl").output
    )
    sets = ["--set", "data.invalid_rows=drop", "--set", "data.test_fraction=0.5", "--set", "global_batch_size=1"]
    write(tmp_path / "mine.jsonl", chat(1), chat(2), {"messages": []})
    assert fitune("prepare", "recipe.yaml", "--dataset", "mine.jsonl", *sets).exit_code == 0


def test_columns_of_own_rows_are_not_mixed_with_the_recipes(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"base": {"model": "./base"}} | RECIPE))
    from fitune.data.prepare_command import with_own_dataset

    data = runs.load_recipe(str(tmp_path / "recipe.yaml")).data
    own = with_own_dataset(data, "mine.csv", ("data.columns={instruction: ask, output: answer}", "data.seed=1"))
    assert own.columns == {"instruction": "ask", "output": "answer"}
    assert (own.dataset, own.train_split, own.test_split, own.revision) == ("mine.csv", "train", "test", None)
    assert (own.system_message, own.train_on, own.long_rows) == ("Be brief.", "last", "cut")


def test_data_of_another_dataset_are_not_replaced_unasked(fitune, tmp_path):
    write(tmp_path / "mine.jsonl", *map(chat, range(8)))
    write(tmp_path / "new.jsonl", *map(chat, range(8, 16)))
    assert fitune("prepare", "recipe.yaml", "--dataset", "mine.jsonl").exit_code == 0
    line = refused(fitune("prepare", "recipe.yaml", "--dataset", "new.jsonl"))
    assert "data/theirs: already exists, with rows of mine.jsonl; replace them with --overwrite, or keep both" in line
    assert "--output data/new, then python cli.py train recipe.yaml --set data.prepared=data/new" in line
    result = fitune("prepare", "recipe.yaml", "--dataset", "new.jsonl", "--output", "data/new")
    assert result.output.splitlines()[-1] == "next: python cli.py train recipe.yaml --set data.prepared=data/new"
    assert train(fitune, "--set", "data.prepared=data/new").exit_code == 0


@pytest.mark.parametrize(
    ("prepared_with", "trained_with", "expected"),
    [
        (["--template", "plain"], [], "prepared with another chat template (plain, not llama3)"),
        ([], ["data.chat_template=plain"], "prepared with another chat template (llama3, not plain)"),
        ([], ["data.system_message=Be kind."], "prepared with system_message 'Be brief.', not 'Be kind.'"),
        ([], ["data.train_on=all"], "prepared with train_on 'last', not 'all'"),
        ([], ["max_length=20"], "tokens, max_length is 20"),
        ([], ["base.model=other"], "prepared with another tokenizer"),
    ],
)
def test_what_differs_is_found_before_a_process_starts(prepared_with, trained_with, expected, fitune, tmp_path):
    write(tmp_path / "mine.jsonl", *map(chat, range(8)))
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    tokenizer = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert fitune("prepare", "recipe.yaml", "--dataset", "mine.jsonl", *prepared_with).exit_code == 0
    line = refused(train(fitune, *(part for value in trained_with for part in ("--set", value))))
    assert line.startswith("error: data/theirs: ") and expected in line
    assert not fitune.started and not Path("runs").exists()
    again = line.partition("prepare the data again: ")[2]
    if "max_length" in expected:
        assert again.endswith(" --overwrite --max-length 20 --long-rows drop")
        return
    assert fitune(*shlex.split(again)[2:]).exit_code == 0, again
    assert train(fitune, *(part for value in trained_with for part in ("--set", value))).exit_code == 0


def test_rows_of_an_own_dataset_are_prepared_again_as_they_were_asked_for(fitune, tmp_path):
    """With what was typed for `prepare`, from any folder; another dataset that is typed for `train` is not read."""
    rows = write(tmp_path / "mine.jsonl", *map(chat, range(16)), {"messages": []})
    asked = ["--drop-invalid", "--set", "data.test_fraction=0.25", "--set", "data.system_message=Hi."]
    assert fitune("prepare", "recipe.yaml", "--dataset", "mine.jsonl", *asked).exit_code == 0
    line = refused(train(fitune))
    again = "prepare recipe.yaml --dataset mine.jsonl --drop-invalid --set data.test_fraction=0.25 --overwrite"
    assert line.endswith(f"not 'Be brief.'; prepare the data again: python cli.py {again}")
    assert fitune(*shlex.split(again)).exit_code == 0
    report = json.loads(Path("data/theirs/report.json").read_text())
    assert (report["train_rows"], report["test_rows"]) == (12, 4)
    assert train(fitune).exit_code == 0
    said = refused(train(fitune, "--set", "data.dataset=other.jsonl", "--output", "runs/other"))
    assert "data/theirs: prepared from mine.jsonl, not other.jsonl; prepare the data again: " in said
    assert " recipe.yaml --drop-invalid --set data.dataset=other.jsonl --overwrite" in said
    write(rows, *map(chat, range(17)))
    assert again not in train(fitune, "--output", "runs/other", "--resume").output, "a run goes on with its rows"


def test_a_recipe_is_used_from_another_folder(fitune, tmp_path, monkeypatch):
    for name in ("mine", "more"):
        write(tmp_path / f"{name}.jsonl", *({"messages": chat(f"{name} {n}")["messages"]} for n in range(8)))
    recipe = {"base": {"model": "./base"}} | RECIPE | {"data": OF_A_MIXTURE}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert fitune("prepare", "recipe.yaml").exit_code == 0
    monkeypatch.chdir(tmp_path.parent)
    name = f"{tmp_path.name}/recipe.yaml"
    of_it = ["train", name, "--profile", "cpu_2proc", "--force", "--output", tmp_path / "run"]
    result = fitune(*of_it)
    assert result.exit_code == 0 and "prepared from" not in result.output
    assert "prepared with data.weight 1.0, not 2.0" in refused(fitune(*of_it, "--set", "data.weight=2"))


OF_A_MIXTURE = {"dataset": "mine.jsonl", "prepared": "data/mixed", "mix": [{"dataset": "more.jsonl", "weight": 2}]}


@pytest.mark.parametrize(
    ("trained_with", "expected"),
    [
        ("data.weight=3", "data.weight 1.0, not 3.0"),
        ("data.mix=[{dataset: more.jsonl, weight: 9}]", "data.mix[0].weight 2.0, not 9.0"),
        ("data.mix=[{dataset: other.jsonl, weight: 2}]", "data.mix[0].dataset 'more.jsonl', not 'other.jsonl'"),
        ("data.mix=[]", "sources in data.mix: 1, not 0"),
        ("data.test_fraction=0.5", "data.test_fraction 0.05, not 0.5"),
        ("data.ignored_keys=[score]", 'data.ignored_keys [], not ["score"]'),
    ],
)
def test_a_setting_that_chooses_rows_is_followed_or_refused(trained_with, expected, fitune, tmp_path):
    for name, first in (("mine", 0), ("more", 8), ("other", 16)):
        write(tmp_path / f"{name}.jsonl", *map(chat, range(first, first + 8)))
    recipe = {"base": {"model": "./base"}} | RECIPE
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"data": OF_A_MIXTURE}))
    assert fitune("prepare", "recipe.yaml").exit_code == 0
    assert train(fitune).exit_code == 0
    line = refused(train(fitune, "--set", trained_with, "--output", "runs/other"))
    assert line.startswith(f"error: data/mixed: prepared with {expected}; prepare the data again: ")
    assert fitune(*shlex.split(line.partition("again: ")[2])[2:]).exit_code == 0, line
    assert train(fitune, "--set", trained_with, "--output", "runs/other").exit_code == 0


def test_rows_that_changed_since_are_said(fitune, tmp_path):
    rows = write(tmp_path / "mine.jsonl", *map(chat, range(8)))
    recipe = {"base": {"model": "./base"}} | RECIPE | {"data": {"dataset": "mine.jsonl", "prepared": "data/mine"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert fitune("prepare", "recipe.yaml").exit_code == 0
    rows.touch()
    assert "changed" not in train(fitune).output, "its contents are the same"
    write(rows, *map(chat, range(9)))
    again = "python cli.py prepare recipe.yaml --overwrite"
    said = f"note: data/mine was prepared before {rows} changed; to prepare the changed rows: {again}"
    assert said in train(fitune, "--output", "runs/second").output.splitlines()


def prepare_and_write_a_run(fitune, tmp_path) -> Run:
    """As if it had been trained: `run`, with an adapter's folder."""
    write(tmp_path / "mine.jsonl", *map(chat, range(8)))
    fitune("prepare", "recipe.yaml", "--dataset", "mine.jsonl")
    run = runs.resolve("recipe.yaml", "cpu_2proc", output="run")
    empty_adapter(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "run.yaml").write_text(runs.dump(run))
    return run


def test_eval_and_generate_find_it_before_a_process_starts(fitune, tmp_path):
    prepare_and_write_a_run(fitune, tmp_path)
    assert fitune("eval", "run").exit_code == fitune("generate", "run", "--test", "1").exit_code == 0
    assert len(fitune.started) == 2
    fitune("prepare", "recipe.yaml", "--dataset", "mine.jsonl", "--overwrite", "--set", "data.system_message=Hi.")
    for command in (["eval", "run"], ["generate", "run", "--test", "1"]):
        assert "prepared with system_message 'Hi.', not 'Be brief.'" in refused(fitune(*command))
    assert fitune("generate", "run", "--prompt", "Why?").exit_code == 0, "it reads no rows"
    write_chat_record(tmp_path / "run" / "adapter", ChatRecord("0" * 64, "Be brief."))
    assert "trained with another chat template" in refused(fitune("generate", "run", "--prompt", "Why?"))
    assert len(fitune.started) == 3


def test_eval_says_where_other_rows_were_trained(fitune, tmp_path):
    run = prepare_and_write_a_run(fitune, tmp_path)
    assert "note: " not in fitune("eval", "run").output, "it has no checkpoint that knows"
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    finish(run, 1, 1.0)
    known = {"base": "base", "revision": None, "base_fingerprint": {}, "template": "t", "tokenizer": "k", "seed": 42}
    identity = Identity(data=sha256_of_rows(tmp_path / "data/theirs", "train"), **known)
    write_manifest(checkpoint, 1, run, identity, {})
    assert "note: " not in fitune("eval", "run").output
    write(tmp_path / "mine.jsonl", *map(chat, range(9)))
    fitune("prepare", "recipe.yaml", "--dataset", "mine.jsonl", "--overwrite")
    said = "note: data/theirs/train.jsonl holds other rows than "
    assert said in fitune("eval", "run").output and said in fitune("generate", "run", "--test", "1").output


def test_rows_for_no_recipe_need_a_folder(fitune, tmp_path):
    write(tmp_path / "mine.jsonl", *map(chat, range(8)))
    line = refused(fitune("prepare", "--dataset", "mine.jsonl"))
    assert "`python cli.py prepare RECIPE --dataset mine.jsonl`, or --output FOLDER" in line
    assert fitune("prepare", "--dataset", "mine.jsonl", "--output", "out").exit_code == 0
