"""A recipe and a profile of one's own behave like shipped ones, whatever their files are called."""

import shutil

import pytest
from click.testing import CliRunner

from fitune.cli import cli
from fitune.config import run as runs
from fitune.config.catalogue import completed
from fitune.config.model_sizes import is_of_size
from fitune.config.shipped import ACCELERATE_CONFIGS, PROFILES, RECIPES, names
from fitune.errors import UsageError
from fitune.planning.fill import resolve

PROFILE = """\
description: Two cards of mine.
accelerate_config: launch/two.yaml
num_gpus: 2
gpu_memory_gib: 24
host_memory_gib: 64
fits: {8b: [qlora]}
"""


@pytest.fixture
def own(tmp_path):
    """A folder with a recipe, a profile and, in a folder beside it, an accelerate config."""
    folder = tmp_path / "mine"
    (folder / "launch").mkdir(parents=True)
    shutil.copy(RECIPES / "llama3_8b_qlora.yaml", folder / "support_chat.yaml")
    shutil.copy(ACCELERATE_CONFIGS / "fsdp_2x40gb.yaml", folder / "launch" / "two.yaml")
    (folder / "cards.yaml").write_text(PROFILE, encoding="utf-8")
    return folder


def test_a_folder_of_ones_own_is_listed_with_what_goes_together(own):
    (own / "broken.yaml").write_text("base: {model: x}\n", encoding="utf-8")
    result = CliRunner().invoke(cli, ["list", str(own)])
    assert result.exit_code == 0, result.output
    [pairs] = [line for line in result.output.splitlines() if "single_gpu" in line]
    assert str(own / "support_chat.yaml") in pairs and str(own / "cards.yaml") in pairs
    assert "fsdp_full_16x80gb" not in pairs
    assert "Two cards of mine." in result.output and "2 GPU processes, bf16" in result.output
    assert "cannot be read" in result.output and "'description'" in result.output


@pytest.mark.parametrize(("left", "missing"), [("num_gpus: 2", "'accelerate_config'"), ("method: lora", "'base'")])
def test_a_file_that_lacks_what_it_must_have_is_not_left_out(left, missing, own):
    (own / "mine.yaml").write_text(f"{left}\n", encoding="utf-8")
    (own / "others.yaml").write_text("program: sweep.py\nmethod: bayes\n", encoding="utf-8")
    output = CliRunner().invoke(cli, ["list", str(own)]).stdout
    assert f"{own / 'mine.yaml'}: keys " in output and missing in output and "others" not in output


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_a_folder_without_files_is_refused_in_one_line(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(cli, ["list", str(tmp_path / folder)])
    assert result.exit_code == 2 and str(tmp_path / folder) in result.stderr and result.stderr.count("\n") == 1


def test_the_size_is_the_models_not_the_files(own):
    recipe = runs.load_recipe(str(own / "support_chat.yaml"))
    small, large = (runs.load_profile(name) for name in ("single_gpu_8gb", "fsdp_offload_1x24gb"))
    assert runs.goes_with(recipe, small) and not runs.goes_with(recipe, large)
    recipe = runs.load_recipe(str(own / "support_chat.yaml"), {"base": {"model": "meta-llama/Llama-3.1-70B"}})
    assert runs.goes_with(recipe, large) and not runs.goes_with(recipe, small)


def test_names_of_sizes():
    assert is_of_size(int(8.03e9), "8b") and not is_of_size(int(13e9), "8b") and not is_of_size(int(3.2e9), "8b")
    assert is_of_size(134_515_008, "135m") and is_of_size(134_515_008, "tiny") and not is_of_size(int(1e9), "tiny")
    assert is_of_size(None, "tiny") and not is_of_size(None, "8b") and is_of_size(None, "any")


def test_an_accelerate_config_is_looked_for_beside_its_profile_then_in_the_working_folder(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = resolve("mine/support_chat.yaml", "mine/cards.yaml", output=str(tmp_path / "run"))
    assert run.accelerate.path == "mine/launch/two.yaml" and run.accelerate.num_processes == 2
    (own / "launch").rename(tmp_path / "launch")
    assert resolve("mine/support_chat.yaml", "mine/cards.yaml").accelerate.path == "launch/two.yaml"
    (tmp_path / "launch" / "two.yaml").unlink()
    with pytest.raises(UsageError, match=r"accelerate config launch/two.yaml: no such file"):
        resolve("mine/support_chat.yaml", "mine/cards.yaml")


def test_a_profile_says_for_which_models_it_is_only_if_it_wants_to(own):
    (own / "cards.yaml").write_text(PROFILE.replace("fits: {8b: [qlora]}\n", ""), encoding="utf-8")
    profile = runs.load_profile(str(own / "cards.yaml"))
    assert all(runs.goes_with(runs.load_recipe(name), profile) for name in names(RECIPES))


def test_completion_has_shipped_names_and_files_of_that_kind(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert completed(RECIPES, "recipe", "llama3_8b_q") == ["llama3_8b_qlora"]
    assert completed(RECIPES, "recipe", "mi") == ["mine/"]
    assert completed(RECIPES, "recipe", "mine/") == ["mine/support_chat.yaml", "mine/launch/"]
    assert completed(PROFILES, "profile", "mine/c") == ["mine/cards.yaml"]
    assert completed(PROFILES, "profile", "mine/s") == []
