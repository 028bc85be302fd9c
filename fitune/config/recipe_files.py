"""A recipe's file and those that it extends: `extends: llama3_8b_qlora`, or the path of another recipe.

A recipe that extends another has all its keys but for those that it gives itself. A block, such as `data:`, is joined
key by key; a list and any other value is replaced; `lora: null` takes a block away.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fitune.config.gguf_files import refuse_gguf
from fitune.config.recipe_paths import found_beside, refuse_missing
from fitune.config.shipped import RECIPES, find, is_path, names
from fitune.config.yaml_file import line_of, read_yaml
from fitune.errors import UsageError

EXTENDS = "extends"


@dataclass(frozen=True)
class RecipeFile:
    path: Path
    values: dict
    "As written, without `extends`."


def read_recipe_files(name: str) -> list[RecipeFile]:
    """The file of the recipe called `name`, then what it extends, what that extends, and so on.

    Raises UsageError, file and line named, for a recipe that is not there and for one that extends itself.
    """
    if name and name not in names(RECIPES):
        refuse_gguf(Path(name), "recipe")
    files = [_read(find(name, RECIPES, "recipe"))]
    seen = {files[0][0].path.resolve()}
    while (parent := files[-1][1]) is not None:
        child = files[-1][0].path
        where = f"{child}:{line_of(child, [EXTENDS])}: {EXTENDS}"
        path = _parent_file(parent, child, where)
        if path.resolve() in seen:
            chain = " -> ".join(file.path.stem for file, _ in files)
            raise UsageError(f"{where}: {parent}: a recipe cannot extend itself: {chain} -> {path.stem}")
        seen.add(path.resolve())
        files.append(_read(path))
    return [file for file, _ in files]


def _read(path: Path) -> tuple[RecipeFile, object]:
    """A recipe's file and what it extends, None for nothing."""
    values = read_yaml(path)
    parent = values.pop(EXTENDS, None)
    return RecipeFile(path, values), parent


def _parent_file(parent: object, child: Path, where: str) -> Path:
    if not isinstance(parent, str) or not parent:
        raise UsageError(f"{where}: {parent!r}: give one recipe, by its name or the path of its file")
    beside = child.parent / Path(parent).expanduser()
    try:
        return beside if is_path(parent) and beside.is_file() else find(parent, RECIPES, "recipe")
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def values_of(files: list[RecipeFile]) -> dict:
    """All keys of a recipe; each relative path that leads somewhere from its own file on is seen from here."""
    values: dict = {}
    for file in reversed(files):
        values = joined(values, found_beside(file.values, file.path.parent))
    return values


def joined(values: dict, changes: dict) -> dict:
    """`values` with `changes` put over them, blocks key by key."""
    result = dict(values)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = joined(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def where_written(files: list[RecipeFile], overrides: dict) -> Callable[[Sequence], str]:
    """A function that names the place of a key, given as its path: `--set`, or a file and its line."""

    def where(keys: Sequence) -> str:
        if keys and _has(overrides, keys):
            return f"{files[0].path} with --set"
        for file in files:
            if keys and _has(file.values, keys):
                return f"{file.path}:{line_of(file.path, keys)}"
        return str(files[0].path)

    return where


def _has(values: object, keys: Sequence) -> bool:
    for key in keys:
        in_list = isinstance(values, list) and isinstance(key, int) and key < len(values)
        if not in_list and not (isinstance(values, dict) and key in values):
            return False
        values = values[key]
    return True


def refuse_missing_paths(files: list[RecipeFile], overrides: dict, name_as_typed: str, keys: tuple[str, ...]) -> None:
    """Raises UsageError, which says where it looked, if a path under one of `keys` leads nowhere."""
    given = overrides
    for file in files:
        refuse_missing(file.values, given, file.path, name_as_typed, keys)
        given = joined(given, file.values)
