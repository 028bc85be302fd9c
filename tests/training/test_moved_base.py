"""The folder of a run's base was moved after training: each command says which key of run.yaml names it."""

import shutil

import pytest
from click.testing import CliRunner
from results import empty_adapter

from fitune.cli import cli
from fitune.config import run as runs
from fitune.config.accelerate_config import written_out
from fitune.config.base_of_run import base_of_run


@pytest.fixture
def run(make_run, tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    made = make_run(base, tmp_path / "run", "lora")
    empty_adapter(made.result_folder)
    processes = made.accelerate.model_copy(update={"path": str(made.folder / "accelerate.yaml")})
    (made.folder / "accelerate.yaml").write_text(written_out(processes))
    made = made.model_copy(update={"accelerate": processes})
    (made.folder / "run.yaml").write_text(runs.dump(made))
    base.rename(tmp_path / "moved")
    return made


def commands(run) -> list[list[str]]:
    folder = str(run.folder)
    return [
        ["eval", folder], ["generate", folder, "--prompt", "Hi"], ["train", "--resume", folder],
        ["merge", folder, "--output", f"{folder}/merged"],
    ]  # fmt: skip


def test_the_key_of_run_yaml_is_named(run, tmp_path):
    for words in commands(run):
        done = CliRunner().invoke(cli, words)
        assert done.exit_code == 2 and done.stderr.strip().count("\n") == 0, done.output
        assert f"error: {tmp_path / 'base'}: no such folder" in done.stderr, words
        settings = run.folder / "run.yaml"
        said = f"; if the base was moved, write its new place at recipe.base.model in {settings}"
        assert done.stderr.strip().endswith(said), words


def test_what_it_says_helps(run, tmp_path):
    settings = run.folder / "run.yaml"
    settings.write_text(settings.read_text().replace(str(tmp_path / "base"), str(tmp_path / "moved")))
    assert base_of_run(runs.load(run.folder)) == tmp_path / "moved"
