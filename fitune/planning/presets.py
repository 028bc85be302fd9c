"""The shipped profiles, and one's own, as presets: the runs of a recipe with each, and how such a run is typed."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from fitune.config import run as runs
from fitune.config.accelerate_config import read_accelerate_config
from fitune.config.catalogue import own_files
from fitune.config.command_name import command
from fitune.config.recipe import Recipe
from fitune.config.schema import AUTO, SMALLEST, Run
from fitune.config.shipped import ACCELERATE_CONFIGS, PROFILES, find, is_path, names
from fitune.errors import UsageError
from fitune.planning.fill import filled
from fitune.planning.limits import limits_of


def preset_runs(
    recipe_name: str, recipe: Recipe, overrides: dict | None = None, *, any_method: bool = False,
    own: Sequence[str] = (),
) -> Iterator[Run]:  # fmt: skip
    """The runs of a recipe with every profile that is meant for it, shipped ones and the files `own`.

    Rows and kept layers are left to `plan`; those that `overrides` gives are as given.
    """
    left_to_plan = dict.fromkeys(SMALLEST, AUTO)
    if any_method and recipe.method != "full":
        left_to_plan |= {
            "optimizer_state": "fp32",
            "optimizer_offload": False,
        }  # an adapter's, also where the profile is meant for full fine-tuning
    for name in [*names(PROFILES), *own]:
        if any_method or runs.goes_with(recipe, runs.load_profile(name)):
            yield preset_run(recipe_name, recipe, name, left_to_plan | (overrides or {}))


def own_profiles(recipe: str, folder: Path | None) -> tuple[str, ...]:
    """The profiles in a folder of one's own, and in that of a recipe that is given by its path: `list` shows the same.

    Raises UsageError for a `folder` without one.
    """
    found = dict.fromkeys(own_files(folder).profiles if folder else ())
    if folder and not found:
        raise UsageError(
            f"--profiles {folder}: no memory profile (*.yaml) in it; `{command('list', folder)}` shows what there is"
        )
    if is_path(recipe) and Path(recipe).is_file():
        found |= dict.fromkeys(own_files(Path(recipe).parent).profiles)
    shipped = {(PROFILES / f"{name}.yaml").resolve() for name in names(PROFILES)}
    return tuple(path for path in found if Path(path).resolve() not in shipped)


def as_typed(run: Run, sets: tuple[str, ...] = ()) -> str:
    """A preset's name, and the `--set` that make the shipped one that of a run which was filled elsewhere."""
    shipped = preset_run(run.recipe_name, run.recipe, run.profile_name, runs.parse_sets(sets)[1])
    as_shipped = filled(shipped, limits_of(shipped)).profile
    found = {key: getattr(run.profile, key) for key in ("replicas", *SMALLEST)}
    changes = [f"profile.{key}={number}" for key, number in found.items() if number != getattr(as_shipped, key)]
    for key in ("kept_attention", "activation_offload"):
        if (value := getattr(run.profile, key)) != getattr(as_shipped, key):
            changes.append(f"profile.{key}={str(value).lower()}")
    return " --set ".join([shlex.quote(run.profile_name), *changes])


def preset_run(recipe_name: str, recipe: Recipe, profile_name: str, overrides: dict | None = None) -> Run:
    profile = runs.load_profile(profile_name, overrides)
    config = find(profile.accelerate_config, ACCELERATE_CONFIGS, "accelerate config")
    return runs.run_of(recipe_name, recipe, profile_name, profile, read_accelerate_config(config), output="")
