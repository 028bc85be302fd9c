"""Profiles of one's own stand beside the shipped ones in `plan --find`, `--all` and what it proposes."""

import json
import shutil

import pytest
from click.testing import CliRunner

from fitune.cli import cli

PROFILE = """\
description: My two cards.
accelerate_config: two.accelerate.yaml
num_gpus: 2
gpu_memory_gib: 24
host_memory_gib: 64
fits: {8b: [qlora]}
"""
ACCELERATE = """\
distributed_type: FSDP
fsdp_config: {fsdp_version: 2}
mixed_precision: bf16
num_processes: 2
"""
RECIPE = "extends: llama3_8b_qlora\ndescription: Mine.\n"
ON_THE_CPU = """\
description: Four processes of my processor.
accelerate_config: four.accelerate.yaml
num_gpus: 0
host_memory_gib: 3
fits: {tiny: [qlora]}
"""
TWO_CARDS = ["--gpus", "2", "--gpu", "RTX 4090", "--host-memory", "64"]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with a recipe, and a profile in a folder of its own."""
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards/two.yaml").write_text(PROFILE)
    (tmp_path / "cards/two.accelerate.yaml").write_text(ACCELERATE)
    (tmp_path / "my.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _plan(*words: str, code: int = 0):
    done = CliRunner().invoke(cli, ["plan", *words])
    assert done.exit_code == code, done.output
    return done


def test_find_shows_what_they_come_to_on_that_machine(mine):
    found = json.loads(_plan("my.yaml", "--find", *TWO_CARDS, "--json").stdout)
    [own] = found["own_profiles"]
    assert (
        own["profile"] == "cards/two.yaml"
        and own["fits"]
        and own["step_seconds"]
        == pytest.approx(
            found["estimate"]["step_seconds"]  # its cards, with rows and kept layers left to plan: what a search finds
        )
    )
    assert "\ncards/two.yaml" in _plan("my.yaml", "--find", *TWO_CARDS).stdout
    one_card = json.loads(_plan("my.yaml", "--find", "--gpus", "1", "--gpu", "RTX 4090", "--json").stdout)
    assert one_card["own_profiles"][0]["why_not"] == "GPUs: needs 2, has 1"


def test_of_a_shipped_recipe_they_are_those_of_a_folder(mine):
    assert json.loads(_plan("llama3_8b_qlora", "--find", *TWO_CARDS, "--json").stdout)["own_profiles"] == []
    found = json.loads(_plan("llama3_8b_qlora", "--find", *TWO_CARDS, "--profiles", "cards", "--json").stdout)
    assert [own["profile"] for own in found["own_profiles"]] == ["cards/two.yaml"]
    other_method = json.loads(_plan("llama3_8b_lora", "--find", *TWO_CARDS, "--profiles", "cards", "--json").stdout)
    assert other_method["own_profiles"] == []
    (mine / "empty").mkdir()
    assert "--profiles empty: no memory profile" in _plan("llama3_8b_qlora", "--profiles", "empty", code=2).stderr


def test_all_and_the_nearest_change_that_fits_have_them(mine):
    rows = json.loads(_plan("my.yaml", "--all", "--json").stdout)
    assert rows[-1]["profile"] == "cards/two.yaml" and rows[-1]["methods"]["qlora"]["fits"]
    shutil.copytree(mine / "cards", mine / "other")
    text = PROFILE.replace("gpu_memory_gib: 24", "gpu_memory_gib: 23.5").replace("{8b: [qlora]}", "{any: [qlora]}")
    (mine / "other/two.yaml").write_text(text)
    words = ["llama3_8b_qlora", "--profile", "cards/two.yaml"]
    words += ["--set", "profile.micro_batch=4", "--set", "profile.kept_layers=32"]
    assert "or   --profile other/two.yaml" in _plan(*words, "--profiles", "other").stdout
    assert "other/two.yaml" not in _plan(*words).stdout


def test_one_whose_accelerate_config_is_gone_is_listed_as_broken_and_stops_no_plan(mine):
    (mine / "cards/two.accelerate.yaml").unlink()
    assert json.loads(_plan("my.yaml", "--find", *TWO_CARDS, "--json").stdout)["own_profiles"] == []
    listed = CliRunner().invoke(cli, ["list", "."]).stdout.partition("cannot be read\n")[2]
    assert listed.splitlines()[0] == "  cards/two.yaml  accelerate config two.accelerate.yaml: no such file"


def test_one_without_gpus_that_does_not_fit_is_told_of_another(mine):
    (mine / "processor.yaml").write_text(ON_THE_CPU)
    (mine / "four.accelerate.yaml").write_text("distributed_type: FSDP\nuse_cpu: true\nnum_processes: 4\n")
    shape = {"model_type": "llama", "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4,
             "num_attention_heads": 8, "vocab_size": 32000, "max_position_embeddings": 512}  # fmt: skip
    (mine / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    asked = ["tiny_qlora", "--profile", "processor.yaml", "--set", "base.model=."]
    planned = json.loads(_plan(*asked, "--json").stdout)
    assert not planned["fits"] and planned["changes"][-1].startswith("--profile cpu_2proc"), planned["changes"]
