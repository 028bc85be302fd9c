"""What fits where a recipe does not: other settings, or a shipped recipe of the same base that takes less."""

from collections.abc import Callable

from fitune.config import run as runs
from fitune.config.recipe import Recipe
from fitune.config.shipped import RECIPES, names
from fitune.planning.outlook import nearest_changes
from fitune.planning.plan import Plan

METHODS = ("full", "lora", "qlora")
"What takes most memory first."


def what_fits(nearest: Plan, does_fit: Callable[[str], bool]) -> str:
    """The changes that make `nearest` fit, as they are typed; '' where none is known.

    `does_fit` says whether a shipped recipe fits there.
    """
    found = nearest_changes(nearest)
    if recipe := next(filter(does_fit, _lighter(nearest.run.recipe)), None):
        found.append(f"the recipe {recipe}")
    return " or ".join(found)


def _lighter(recipe: Recipe) -> list[str]:
    """The shipped recipes of the same base whose method takes less memory, what takes most first."""
    shipped = {name: runs.load_recipe(name) for name in names(RECIPES)}
    less = METHODS[METHODS.index(recipe.method) + 1 :]
    same = [name for name, other in shipped.items() if other.base.model == recipe.base.model and other.method in less]
    return sorted(same, key=lambda name: METHODS.index(shipped[name].method))
