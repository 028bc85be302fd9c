"""Recipes that extend others: what they have, and errors that name the file and the line a value comes from."""

import pytest
from click.testing import CliRunner

from fitune.cli import cli
from fitune.config.run import check_paths, load_recipe, resolve
from fitune.config.shipped import RECIPES, find, name_of
from fitune.errors import UsageError
from fitune.planning.fill import resolve as resolve_and_fill
from fitune.planning.limits import limits_of
from fitune.planning.plan import make_plan

INSTRUCT = {
    "llama3.1_8b_qlora": ("llama3_8b_qlora", "meta-llama/Llama-3.1-8B-Instruct", 8.03, "single_gpu"),
    "llama3.2_1b_qlora": ("llama3_8b_qlora", "meta-llama/Llama-3.2-1B-Instruct", 1.236, "single_gpu_8gb"),
    "llama3.2_3b_qlora": ("llama3_8b_qlora", "meta-llama/Llama-3.2-3B-Instruct", 3.213, "single_gpu_8gb"),
    "llama3.3_70b_qlora": ("llama3_70b_qlora", "meta-llama/Llama-3.3-70B-Instruct", 70.55, "fsdp_4x24gb"),
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes recipes, name and text, and gives the path of the first."""
    monkeypatch.chdir(tmp_path)

    def write(**texts: str) -> str:
        for name, text in texts.items():
            (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
        return f"./{next(iter(texts))}.yaml"

    return write


def refused(name: str, *said: str, sets: dict | None = None) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(name, sets)
    assert "\n" not in str(caught.value)
    for part in said:
        assert part in str(caught.value), str(caught.value)


def test_what_a_recipe_says_itself_counts_and_the_rest_is_inherited(write):
    parent = load_recipe("tiny_lora")
    recipe = load_recipe(write(mine="extends: tiny_lora\nseed: 7\nlora:\n  r: 8\ndata:\n  test_fraction: 0.1\n"))
    expected = {"seed": 7, "lora": parent.lora.model_copy(update={"r": 8})}
    expected["data"] = parent.data.model_copy(update={"test_fraction": 0.1})
    assert recipe == parent.model_copy(update=expected)


def test_a_chain_of_recipes_a_block_taken_away_and_a_list_replaced(write):
    last = "extends: tiny_lora\nlora: {target_modules: [q_proj, k_proj]}\nseed: 1\nmax_length: 99\n"
    name = write(first="extends: second.yaml\nseed: 3\n", second="extends: ./third.yaml\nseed: 2\n", third=last)
    recipe = load_recipe(name)
    assert (recipe.seed, recipe.max_length, recipe.lora.target_modules) == (3, 99, ["q_proj", "k_proj"])
    shorter = write(fourth="extends: first.yaml\nlora: {target_modules: [v_proj]}\n")
    assert load_recipe(shorter).lora.target_modules == ["v_proj"]
    assert load_recipe(write(full="extends: first.yaml\nmethod: full\nlora: null\n")).lora is None


def test_null_takes_a_field_of_training_away(write):
    """But for one that may be null; where nothing is inherited there is nothing to take away."""
    name = write(mine="extends: tiny_lora\ntraining: {max_steps: null, num_train_epochs: 2, save_total_limit: null}\n")
    training = load_recipe(name).training
    assert "max_steps" not in training and training["num_train_epochs"] == 2
    assert training["save_total_limit"] is None
    sets = {"training": {"num_train_epochs": None}}
    assert "num_train_epochs" not in load_recipe(name, sets).training
    own = "extends: tiny_lora\ntraining: {weight_decay: null}\n"
    refused(write(own=own), "own.yaml:2: training.weight_decay has no value; give one, or remove it")


def test_a_parent_is_looked_for_beside_the_recipe_then_in_the_working_folder(write, tmp_path):
    (tmp_path / "sub").mkdir()
    write(parent="extends: tiny_lora\nseed: 1\n")
    (tmp_path / "sub" / "mine.yaml").write_text("extends: parent.yaml\n")
    assert load_recipe("sub/mine.yaml").seed == 1
    (tmp_path / "sub" / "parent.yaml").write_text("extends: tiny_lora\nseed: 2\n")
    assert load_recipe("sub/mine.yaml").seed == 2


def test_inherited_paths_belong_to_the_file_that_has_them(write, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "rows.jsonl").touch()
    (tmp_path / "sub" / "parent.yaml").write_text("extends: tiny_lora\ndata: {dataset: rows.jsonl}\n")
    name = write(mine="extends: sub/parent.yaml\ndata: {prepared: data/mine}\n")
    assert load_recipe(name).data.dataset == "sub/rows.jsonl"
    check_paths(name, (), "data.dataset")
    (tmp_path / "sub" / "rows.jsonl").unlink()
    with pytest.raises(UsageError, match=r"sub/parent.yaml: data.dataset rows.jsonl: no such file"):
        check_paths(name, (), "data.dataset")
    check_paths(write(own="extends: sub/parent.yaml\ndata: {dataset: org/rows}\n"), (), "data.dataset")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nextends: tiny_lorra\n", ["mine.yaml:2: extends: no recipe called 'tiny_lorra'", "'tiny_lora'"]),
        ("extends: ./none.yaml\n", ["mine.yaml:1: extends: recipe ./none.yaml: no such file"]),
        ("extends: [tiny_lora, tiny_full]\n", ["mine.yaml:1: extends: ['tiny_lora', 'tiny_full']: give one recipe"]),
        ("extends:\n", ["keys 'description', 'base', 'data'"]),
        ("extend: tiny_lora\n", ["mine.yaml:1: unknown key 'extend'; did you mean 'extends'?"]),
        ("extends: mine.yaml\n", ["mine.yaml:1: extends: mine.yaml: a recipe cannot extend itself: mine -> mine"]),
    ],
)
def test_a_parent_that_is_none_is_named_with_its_line(text, said, write):
    refused(write(mine=text), *said)


def test_a_circle_is_named(write):
    name = write(a="seed: 1\nextends: b.yaml\n", b="extends: c.yaml\n", c="\nextends: ./a.yaml\n")
    refused(name, "c.yaml:2: extends: ./a.yaml: a recipe cannot extend itself: a -> b -> c -> a")


def test_errors_name_the_file_and_the_line_that_a_value_comes_from(write):
    parent = "extends: tiny_lora\nlora:\n  r: 8\n  alpa: 3\n"
    refused(
        write(mine="extends: parent.yaml\n", parent=parent), "parent.yaml:4: unknown key 'lora.alpa'", "'lora.alpha'"
    )
    refused(write(mine="extends: tiny_lora\n\nmax_length: 0\n"), "mine.yaml:3: max_length: ", "not 0")
    refused(write(mine="extends: tiny_lora\ntraining:\n  max_step: 3\n"), "mine.yaml:3: training.max_step", "max_steps")
    refused(write(mine="extends: tiny_lora\n"), "mine.yaml with --set: unknown key 'sede'", sets={"sede": 1})
    early = {"early_stopping": {"patience": 2}}
    refused(write(mine="extends: tiny_lora\n"), "mine.yaml with --set: early_stopping needs evaluations", sets=early)
    refused(
        write(mine="extends: tiny_lora\n"), "take the 'lora:' block away (--set lora=null)", sets={"method": "full"}
    )
    mix = "extends: tiny_lora\ndata:\n  mix:\n    - dataset: a\n    - dataset: b\n      weigth: 2\n"
    refused(write(mine=mix), "mine.yaml:6: unknown key 'data.mix.1.weigth'")


@pytest.mark.parametrize("name", INSTRUCT)
def test_the_instruct_models_have_recipes_sizes_and_a_card_that_fits(name):
    parent, model, billions, profile = INSTRUCT[name]
    recipe, inherited = load_recipe(name), load_recipe(parent)
    assert (recipe.base.model, recipe.data.chat_template) == (model, "tokenizer")
    assert (recipe.method, recipe.lora, recipe.training) == ("qlora", inherited.lora, inherited.training)
    run = resolve_and_fill(name, profile)
    assert (run.recipe_name, run.folder.name) == (name, f"{name}-{profile}")
    plan = make_plan(run, limits_of(run))
    assert plan.fits and plan.setup.shape.parameters / 1e9 == pytest.approx(billions, rel=1e-3)


@pytest.mark.parametrize("command", [["show", "llama3.2_1b_qlora", "--profile", "single_gpu"], ["list"]])
def test_commands_know_them(command):
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    assert "meta-llama/Llama-3.2-1B-Instruct" in result.output or "llama3.2_1b_qlora" in result.output


def test_plan_finds_what_fits_for_them():
    words = ["plan", "llama3.2_3b_qlora", "--find", "--gpus", "1", "--gpu-memory", "8", "--host-memory", "16"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    assert "chosen      1 GPU, weights in RAM" in result.output and "27 of 28 layers kept" in result.output


def test_a_name_with_a_dot_is_no_ending():
    assert name_of("llama3.1_8b_qlora") == name_of("./recipes/llama3.1_8b_qlora.yaml") == "llama3.1_8b_qlora"
    assert find("llama3.1_8b_qlora", RECIPES, "recipe").is_file()
    assert resolve("llama3.1_8b_qlora", "single_gpu").recipe_name == "llama3.1_8b_qlora"
