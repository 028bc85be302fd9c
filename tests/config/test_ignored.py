"""What a field of `training:` asks for is done or refused, never ignored because of another field."""

import pytest
import yaml

from fitune.config import run as runs
from fitune.config.ignored import RULES
from fitune.config.run import load_recipe, resolve, resolve_again
from fitune.config.shipped import RECIPES
from fitune.errors import UsageError

PAIRS = {
    "num_train_epochs": ("2", "max_steps=5"),
    "logging_steps": ("3", "logging_strategy=epoch"),
    "eval_steps": ("3", "eval_strategy=epoch"),
    "save_steps": ("3", "save_strategy=no"),
    "save_total_limit": ("2", "save_strategy=no"),
    "warmup_steps": ("10", "lr_scheduler_type=constant"),
}
"Each field of RULES: a value, and what makes it meaningless."


def sets_of(field: str) -> tuple[str, str]:
    value, other = PAIRS[field]
    return f"training.{field}={value}", f"training.{other}"


def test_every_rule_is_tried():
    assert set(PAIRS) == {rule.field for rule in RULES}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.field)
def test_two_that_do_not_go_together_are_refused(rule, tmp_path):
    field, other = sets_of(rule.field)
    with pytest.raises(UsageError) as caught:
        resolve("tiny_qlora", "cpu_2proc", (field, other))
    said = str(caught.value)
    assert f"training.{rule.field} would be ignored beside {other}; set {rule.instead}, or remove" in said

    content = yaml.safe_load((RECIPES / "tiny_qlora.yaml").read_text(encoding="utf-8"))
    content["training"] = dict(runs.parse_sets((field, other))[0]["training"])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(UsageError, match="would be ignored"):
        load_recipe(str(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.field)
def test_the_command_line_overrules_a_recipe(rule, tmp_path):
    field, other = sets_of(rule.field)
    content = yaml.safe_load((RECIPES / "tiny_qlora.yaml").read_text(encoding="utf-8"))
    content["training"] = dict(runs.parse_sets((field,))[0]["training"])
    if rule.field == "eval_steps":
        content["training"]["eval_strategy"] = "steps"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
    run = resolve(str(recipe), "cpu_2proc", (other,), str(tmp_path / "run"))
    run.folder.mkdir()
    (run.folder / "run.yaml").write_text(runs.dump(run), encoding="utf-8")
    assert resolve_again(run.folder).recipe.training == run.recipe.training
    with pytest.raises(UsageError, match="would be ignored"):
        resolve_again(run.folder, sets=(field,))


def test_epochs_where_the_recipe_counts_steps():
    with pytest.raises(UsageError, match=r"beside training\.max_steps=100; set training\.max_steps=-1"):
        resolve("tiny_qlora", "cpu_2proc", ("training.num_train_epochs=2",))
    run = resolve("tiny_qlora", "cpu_2proc", ("training.num_train_epochs=2", "training.max_steps=-1"))
    assert run.recipe.training["num_train_epochs"] == 2
