"""Relative paths in a user's own recipe: beside it, then in the working folder, and an error that says so."""

import shutil

import pytest
import yaml
from click.testing import CliRunner

from fitune.cli import cli
from fitune.config.run import load_recipe, resolve
from fitune.config.shipped import EXAMPLES, RECIPES
from fitune.demo.tiny_base import build_tiny_base

ROW = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A recipe in `project/`, the working folder `elsewhere/` beside it."""
    for name in ("project", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "project"


def write_recipe(folder, base="base", **data) -> str:
    values = yaml.safe_load((RECIPES / "tiny_qlora.yaml").read_text())
    values["base"]["model"] = base
    values["data"] |= {"dataset": "rows.jsonl", "prepared": "prepared"} | data
    (folder / "mine.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "mine.yaml")


def run(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)))


def test_paths_beside_the_recipe_are_found_from_another_folder(project):
    for file in ("rows.jsonl", "more.jsonl", "mine.jinja"):
        (project / file).touch()
    for folder in ("base", "prepared"):
        (project / folder).mkdir()
    recipe = load_recipe(write_recipe(project, chat_template="mine.jinja", mix=[{"dataset": "more.jsonl"}]))
    assert recipe.base.model == str(project / "base")
    assert recipe.data.dataset == str(project / "rows.jsonl")
    assert recipe.data.prepared == str(project / "prepared")
    assert recipe.data.chat_template == str(project / "mine.jinja")
    assert recipe.data.mix[0].dataset == str(project / "more.jsonl")


def test_beside_the_recipe_comes_before_the_working_folder(project, tmp_path):
    for folder in (project, tmp_path / "elsewhere"):
        (folder / "rows.jsonl").touch()
    assert load_recipe(write_recipe(project)).data.dataset == str(project / "rows.jsonl")
    (project / "rows.jsonl").unlink()
    assert load_recipe(write_recipe(project)).data.dataset == "rows.jsonl"


def test_inside_the_working_folder_a_path_stays_relative(project, tmp_path, monkeypatch):
    """A project that is moved with its runs can still be evaluated."""
    (project / "rows.jsonl").touch()
    write_recipe(project)
    monkeypatch.chdir(tmp_path)
    assert load_recipe("project/mine.yaml").data.dataset == "project/rows.jsonl"
    monkeypatch.chdir(project)
    assert load_recipe("mine.yaml").data.dataset == "rows.jsonl"


def test_names_that_are_no_paths_are_left_alone(project):
    (project / "llama3").touch()  # not the template of that name
    recipe = load_recipe(write_recipe(project, "org/model", dataset="org/rows", chat_template="llama3"))
    assert (recipe.base.model, recipe.data.dataset, recipe.data.chat_template) == ("org/model", "org/rows", "llama3")


def test_values_of_set_are_relative_to_the_working_folder(project):
    (project / "rows.jsonl").touch()
    run_of = resolve(write_recipe(project), "cpu_2proc", ("data.dataset=./rows.jsonl",))
    assert run_of.recipe.data.dataset == "./rows.jsonl"


def test_shipped_recipes_find_their_rows_and_write_into_the_working_folder(project):
    recipe = load_recipe("tiny_qlora")
    assert recipe.data.dataset == str(EXAMPLES / "instructions" / "short_answers.jsonl")
    assert recipe.base.model == "./models/tiny-base" and recipe.data.prepared == "data/tiny"


def test_prepare_writes_beside_the_recipe_only_where_the_folder_is_there(project, tmp_path):
    (project / "rows.jsonl").write_text("".join(ROW.replace('"a"', f'"a{n}"') for n in range(12)))
    recipe = write_recipe(project, test_split=None, test_fraction=0.5)
    first = run("prepare", recipe, "--no-tokens")
    assert first.exit_code == 0, first.output
    assert (tmp_path / "elsewhere/prepared/train.jsonl").is_file() and not (project / "prepared").exists()
    shutil.move(tmp_path / "elsewhere/prepared", project / "prepared")
    again = run("prepare", recipe, "--no-tokens", "--overwrite")
    assert again.exit_code == 0, again.output
    assert not (tmp_path / "elsewhere/prepared").exists()


@pytest.mark.parametrize(
    ("command", "key", "text"),
    [
        (["prepare"], "data.dataset", "rows.jsonl"),
        (["prepare"], "data.dataset", "raw/rows.jsonl"),
        (["prepare"], "data.chat_template", "mine.jinja"),
        (["prepare"], "data.mix", "more.jsonl"),
        (["prepare"], "base.model", "./base"),
        (["prepare"], "base.model", "models/base"),  # as on the Hub, but there is such a folder
        (["train", "--profile", "cpu_2proc"], "data.prepared", "prepared"),
        (["train", "--profile", "cpu_2proc"], "base.model", "base"),
        (["plan", "--profile", "cpu_2proc"], "base.model", "base"),
    ],
)
def test_an_error_says_where_it_looked(project, tmp_path, command, key, text):
    (project / "models").mkdir()
    (project / "there.jsonl").write_text(ROW)
    if key != "data.prepared":
        (project / "prepared").mkdir()
    given = {"dataset": "there.jsonl"}
    base = text if key == "base.model" else "org/model"
    if key == "data.mix":
        given["mix"] = [{"dataset": text}]
    elif key.startswith("data."):
        given[key.removeprefix("data.")] = text
    name, *flags = command
    recipe = write_recipe(project, base, **given)
    outcome = run(name, recipe, *flags)
    assert outcome.exit_code == 2 and outcome.stderr.count("\n") == 1, outcome.output
    assert f"{key} {text}: no such file or folder" in outcome.stderr
    assert f"{project / text}, beside the recipe, and for {tmp_path / 'elsewhere' / text}" in outcome.stderr
    assert (f"run: python cli.py prepare {recipe}" in outcome.stderr) == (key == "data.prepared")


def test_a_shipped_recipe_names_the_working_folder_alone(project, tmp_path):
    outcome = run("train", "tiny_qlora", "--profile", "cpu_2proc")
    said = (
        f"data.prepared data/tiny: no such file or folder in {tmp_path / 'elsewhere'}; run: python cli.py prepare tiny"
    )
    assert said in outcome.stderr


def test_a_path_given_with_set_is_not_looked_for_beside_the_recipe(project):
    build_tiny_base(project / "base", num_layers=1)
    outcome = run("plan", write_recipe(project), "--profile", "cpu_2proc", "--set", "base.model=./base")
    assert outcome.exit_code == 2 and "./base: no such folder" in outcome.stderr
    assert "beside" not in outcome.stderr
