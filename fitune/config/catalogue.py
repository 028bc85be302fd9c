"""What `fitune list` prints: what is shipped, or the files of a folder of one's own."""

from dataclasses import dataclass, field
from pathlib import Path

import click

from fitune.columns import beside
from fitune.config import run as runs
from fitune.config.accelerate_config import read_accelerate_config
from fitune.config.fields import Strict
from fitune.config.model_shapes import find_shape
from fitune.config.recipe import Recipe
from fitune.config.schema import Profile
from fitune.config.shipped import ACCELERATE_CONFIGS, PROFILES, RECIPES, find, names
from fitune.config.yaml_file import read_yaml
from fitune.errors import UsageError

KEYS_OF = {
    "recipe": {"base", "extends"}, "profile": {"accelerate_config"}, "accelerate config": {"distributed_type"},
}  # fmt: skip
"What kind of file it is shows in keys that the others don't have."


@dataclass
class Catalogue:
    """What a folder holds, by the name to type."""

    recipes: dict[str, Recipe] = field(default_factory=dict)
    profiles: dict[str, Profile] = field(default_factory=dict)
    accelerate_configs: dict[str, Path] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    "Files that cannot be read, and why."


def print_catalogue(folder: Path | None) -> None:
    """Recipes and profiles, one line each, accelerate configs, then which profiles go with which recipe."""
    own = shipped = _shipped()
    if folder:
        own = own_files(folder)
        if own == Catalogue():
            raise UsageError(f"{folder}: no recipe, memory profile or accelerate config (*.yaml) in it")
    width = max(map(len, own.recipes), default=0)
    recipes = {f"{name:{width}}  {recipe.method:5}": recipe.description for name, recipe in own.recipes.items()}
    _section("recipes", recipes)
    _section("memory profiles", {name: profile.description for name, profile in own.profiles.items()})
    _section("accelerate configs", _by_what_they_start(own.accelerate_configs))
    _section("cannot be read", own.broken)
    profiles = own.profiles if own is shipped else own.profiles | shipped.profiles
    pairs = {name: _profiles_for(recipe, profiles) for name, recipe in own.recipes.items()}
    _section("profiles that go with each recipe", pairs)


def own_files(folder: Path) -> Catalogue:
    """The files of a folder and of the folders in it. Raises UsageError if there is no such folder."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    found = Catalogue()
    for path in sorted([*folder.glob("*.yaml"), *folder.glob("*/*.yaml")]):
        _add(found, path)
    return found


def _add(found: Catalogue, path: Path) -> None:
    try:
        keys = read_yaml(path)
        if KEYS_OF["recipe"] & keys.keys() or _has_only(keys, Recipe):
            found.recipes[str(path)] = runs.load_recipe(str(path))
        elif KEYS_OF["profile"] & keys.keys() or _has_only(keys, Profile):
            profile = runs.load_profile(str(path))
            read_accelerate_config(find(profile.accelerate_config, ACCELERATE_CONFIGS, "accelerate config"))
            found.profiles[str(path)] = profile
        elif KEYS_OF["accelerate config"] & keys.keys():
            read_accelerate_config(path)
            found.accelerate_configs[str(path)] = path
    except UsageError as error:
        found.broken[str(path)] = str(error)


def _has_only(keys: dict, kind: type[Strict]) -> bool:
    """Whether all keys are of one kind of file, which then lacks one that it must have."""
    return bool(keys) and keys.keys() <= kind.model_fields.keys() and keys.keys() != {"description"}


def completed(folder: Path, kind: str, incomplete: str) -> list[str]:
    """Names in a shipped folder, paths to files of a kind (one of KEYS_OF) and folders that begin so."""
    shipped = [name for name in names(folder) if name.startswith(incomplete)]
    parent, _, start = incomplete.rpartition("/")
    here = sorted(Path(parent or ("/" if incomplete.startswith("/") else ".")).glob(f"{start}*"))
    folders = [f"{path}/" for path in here if path.is_dir() and not path.name.startswith(".")]
    return [*shipped, *(str(path) for path in here if path.suffix == ".yaml" and _is(path, kind)), *folders]


def _is(path: Path, kind: str) -> bool:
    try:
        return bool(KEYS_OF[kind] & read_yaml(path).keys())
    except UsageError:
        return False


def _shipped() -> Catalogue:
    return Catalogue(
        {name: runs.load_recipe(name) for name in names(RECIPES)},
        {name: runs.load_profile(name) for name in names(PROFILES)},
        {name: ACCELERATE_CONFIGS / f"{name}.yaml" for name in names(ACCELERATE_CONFIGS)},
    )


def _profiles_for(recipe: Recipe, profiles: dict[str, Profile]) -> str:
    found = ", ".join(name for name, profile in profiles.items() if runs.goes_with(recipe, profile))
    try:
        find_shape(recipe.base.model, recipe.base.revision)
    except UsageError:
        return f"{found} ({recipe.base.model} is not there yet)"
    return found


def _by_what_they_start(configs: dict[str, Path]) -> dict[str, str]:
    """In words -> the names of those that do so, the fewest processes first."""
    found: dict[str, list[str]] = {}
    for name, path in sorted(configs.items(), key=lambda item: read_accelerate_config(item[1]).num_processes):
        found.setdefault(_launch_words(path), []).append(name)
    return {words: ", ".join(alike) for words, alike in found.items()}


def _launch_words(path: Path) -> str:
    config = read_accelerate_config(path)
    one = config.num_processes == 1
    words = [f"{config.num_processes} {'CPU' if config.use_cpu else 'GPU'} process{'' if one else 'es'}"]
    words += [config.mixed_precision if config.mixed_precision != "no" else "float32"]
    words += [f"{config.num_machines} machines"] if config.num_machines > 1 else []
    words += ["offload"] if config.offload_params else []
    return ", ".join(words)


def _section(title: str, lines: dict[str, str]) -> None:
    if not lines:
        return
    click.secho(title, bold=True)
    width = max(map(len, lines), default=0)
    for name, text in lines.items():
        click.echo(beside(f"  {name:{width}}  ", text))
    click.echo()
