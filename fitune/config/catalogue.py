"""What `fitune list` prints."""

import click

from fitune.config import run as runs
from fitune.config.accelerate_config import read_accelerate_config
from fitune.config.shipped import ACCELERATE_CONFIGS, PROFILES, RECIPES, names


def print_catalogue() -> None:
    """Recipes, profiles and accelerate configs, one line each, then which profiles go with which recipe."""
    recipes = {name: runs.load_recipe(name) for name in names(RECIPES)}
    profiles = {name: runs.load_profile(name) for name in names(PROFILES)}
    _section("recipes", {name: f"{recipe.method:6}{recipe.description}" for name, recipe in recipes.items()})
    _section("memory profiles", {name: profile.description for name, profile in profiles.items()})
    _section("accelerate configs", {name: _launch_words(name) for name in names(ACCELERATE_CONFIGS)})
    pairs = {
        name: ", ".join(p for p, profile in profiles.items() if runs.goes_with(name, recipe, profile))
        for name, recipe in recipes.items()
    }
    _section("profiles that go with each recipe", pairs)


def _launch_words(name: str) -> str:
    config = read_accelerate_config(ACCELERATE_CONFIGS / f"{name}.yaml")
    words = [f"{config.num_processes} {'CPU' if config.use_cpu else 'GPU'} processes", config.mixed_precision]
    words += [f"{config.num_machines} machines"] if config.num_machines > 1 else []
    words += ["weights offloaded to host RAM"] if config.offload_params else []
    return ", ".join(words)


def _section(title: str, lines: dict[str, str]) -> None:
    click.secho(title, bold=True)
    width = max(map(len, lines), default=0)
    for name, text in lines.items():
        click.echo(f"  {name:{width}}  {text}")
    click.echo()
