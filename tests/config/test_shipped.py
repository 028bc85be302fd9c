"""Every recipe, memory profile and accelerate config that is shipped is valid, and goes with the others."""

import pytest
import yaml

from fitune.config import run as runs
from fitune.config.accelerate_config import read_accelerate_config
from fitune.config.fields import Method
from fitune.config.run import load_profile, load_recipe
from fitune.config.schema import Run
from fitune.config.shipped import ACCELERATE_CONFIGS, PROFILES, RECIPES, names
from fitune.planning import fill


@pytest.mark.parametrize("name", names(RECIPES))
def test_shipped_recipe_is_valid_and_has_a_profile(name):
    recipe = load_recipe(name)
    assert recipe.description
    fitting = [p for p in names(PROFILES) if runs.goes_with(recipe, load_profile(p))]
    assert fitting, "no memory profile goes with it"
    for profile in fitting:
        run = fill.resolve(name, profile)
        assert Run.model_validate(yaml.safe_load(runs.dump(run))) == run


@pytest.mark.parametrize("name", names(PROFILES))
def test_shipped_profile_is_valid_and_names_an_accelerate_config(name):
    profile = load_profile(name)
    accelerate = read_accelerate_config(ACCELERATE_CONFIGS / f"{profile.accelerate_config}.yaml")
    assert profile.accelerate_config == name
    assert accelerate.num_processes == profile.num_gpus or (accelerate.use_cpu and not profile.num_gpus)
    assert set(profile.expected) <= set(names(RECIPES))


@pytest.mark.parametrize("name", names(ACCELERATE_CONFIGS))
def test_shipped_accelerate_config_is_valid_and_used(name):
    assert read_accelerate_config(ACCELERATE_CONFIGS / f"{name}.yaml").num_processes >= 1
    assert name in {load_profile(profile).accelerate_config for profile in names(PROFILES)}


def test_every_method_is_shipped():
    shipped = {load_recipe(name).method for name in names(RECIPES)}
    assert shipped == set(Method.__args__)
