"""A GGUF given in place of something else: every command says the same about it, and what to type."""

import json
import shlex

import pytest
from click.testing import CliRunner

from fitune.cli import cli
from fitune.config.gguf_files import gguf_files

RECIPE_WANTED = ("plan", "train", "prepare", "show")
RUN_WANTED = (["merge", "--output", "out"], ["report"], ["generate", "--prompt", "Hi"])


@pytest.fixture
def ggufs(tmp_path, monkeypatch):
    """A folder of two files, whose name needs quotes, in the working folder."""
    folder = tmp_path / "my ggufs"
    folder.mkdir()
    (folder / "mine-bf16.gguf").write_bytes(b"GGUF\xc3" + bytes(9))
    (folder / "mine-Q4_K_M.gguf").write_bytes(b"GGUF\xc3")
    monkeypatch.chdir(tmp_path)
    return folder.relative_to(tmp_path)


def refused(*words) -> str:
    outcome = CliRunner().invoke(cli, list(map(str, words)))
    assert outcome.exit_code == 2 and outcome.stderr.count("\n") == 1, outcome.output
    return outcome.stderr


@pytest.mark.parametrize("name", ["mine-bf16.gguf", "."], ids=["file", "folder"])
def test_every_command_says_what_it_is_and_what_to_type(ggufs, name):
    given = ggufs / name
    what, smallest = ("a GGUF file", given) if name != "." else ("a folder of GGUF files", ggufs / "mine-Q4_K_M.gguf")
    file = shlex.quote(str(smallest))
    uses = f"generate {file} --serve 8000` starts llama.cpp with it, `"
    for command in RECIPE_WANTED:
        said = refused(command, given)
        assert f"{given}: {what}, no recipe: `" in said and uses in said and f"eval {file} --data FOLDER`" in said
    for command, *flags in RUN_WANTED:
        said = refused(command, given, *flags)
        assert f"{given}: {what}, no run: `" in said and uses in said
    wanted = "run, adapter or model's folder" if name == "." else "run"
    said = refused("eval", given, *(["--data", "rows"] if name == "." else ["--tasks", "hellaswag"]))
    assert f"{given}: {what}, no {wanted}: `" in said


def test_a_file_in_the_working_folder_is_known_by_its_name_alone(ggufs, monkeypatch):
    monkeypatch.chdir(ggufs)
    assert "mine-bf16.gguf: a GGUF file, no recipe: " in refused("plan", "mine-bf16.gguf")


def test_no_name_is_not_taken_for_the_working_folder(ggufs, monkeypatch):
    monkeypatch.chdir(ggufs)
    assert "no recipe called ''" in refused("plan", "")


def test_a_file_that_is_not_there_is_not_called_a_gguf(ggufs):
    assert "no such file" in refused("plan", ggufs / "other.gguf")
    assert "no such file" in refused("generate", ggufs / "other.gguf", "--serve", "8000")


def test_a_models_folder_may_have_some_beside_its_own_files(ggufs):
    (ggufs / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert f"{ggufs}: a model's folder, no run's" in refused("report", ggufs)
    assert f"{ggufs}: no run, so it knows no held-out rows" in refused("eval", ggufs)


def test_the_smallest_comes_first(ggufs):
    assert [file.name for file in gguf_files(ggufs)] == ["mine-Q4_K_M.gguf", "mine-bf16.gguf"]


def test_how_a_gguf_is_held_or_measured_elsewhere_is_refused(ggufs):
    given = ggufs / "mine-bf16.gguf"
    assert "--load nf4: llama.cpp holds a GGUF as it is" in refused("eval", given, "--load", "nf4")
    assert "leave out --machine-rank" in refused("eval", given, "--machine-rank", "1")
    assert "leave out --machine-rank" in refused("generate", given, "--serve", "8000", "--machine-rank", "1")
