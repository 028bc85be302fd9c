"""Relative paths in a recipe: looked for beside the recipe's file first, then in the working folder.

So a recipe can be kept with its data and used from anywhere. What is found nowhere stays as it is written: it may be a
Hub id, or a folder that `prepare` will write in the working folder. Values of `--set` are typed, not kept: they are
relative to the working folder alone.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from fitune.config.command_name import command
from fitune.config.shipped import RECIPES
from fitune.errors import UsageError

KEYS = ("base.model", "data.dataset", "data.mix", "data.prepared", "data.chat_template")
"Keys whose values may be paths; of `data.mix`, each source's `dataset`."
_DATA_FILE = re.compile(r"\.(jsonl?|parquet|[ct]sv|gz|zst)$", re.IGNORECASE)


def found_beside(recipe: dict, folder: Path) -> dict:
    """A recipe's contents, with each relative path that leads somewhere from `folder` on, seen from here."""
    return _each_path(recipe, lambda values, key: path_from_here(values, key, folder))


def absolute_paths(recipe: dict) -> dict:
    """A recipe's contents with each path that leads somewhere absolute: so two recipes can be compared."""
    return _each_path(recipe, _absolute)


def _absolute(values: dict, key: str) -> dict:
    found = Path(values[key]).exists()
    return {key: os.path.abspath(values[key])} if found else {}  # noqa: PTH100 (takes out `..`, as _from_here does)


def _each_path(recipe: dict, change: Callable[[dict, str], dict]) -> dict:
    """A recipe's contents in which `change(mapping, key)` was made to each mapping that may have a path under `key`."""
    base, data = _block(recipe, "base"), _block(recipe, "data")
    for values, key in _places(base, data):
        values.update(change(values, key))
    return recipe | {name: block for name, block in (("base", base), ("data", data)) if block}


def path_from_here(values: dict, key: str, folder: Path) -> dict:
    """`values` whose relative path under `key`, if it leads somewhere from `folder` on, is seen from here."""
    written = values.get(key)
    if not isinstance(written, str) or Path(written).expanduser().is_absolute() or not (folder / written).exists():
        return values
    return values | {key: _from_here(folder / written, written)}


def refuse_missing(recipe: dict, overrides: dict, file: Path, name_as_typed: str, keys: tuple[str, ...]) -> None:
    """Raises UsageError for the first path under `keys` that is neither beside the recipe nor in the working folder.

    What `overrides` replace, or what may be a Hub id, is not looked at.
    """
    base, data = _block(recipe, "base"), _block(recipe, "data")
    for name in keys:
        block, _, key = name.partition(".")
        if key in _block(overrides, block):
            continue
        for values, inner in _places(base, data, only=name):
            text = values[inner]
            found = (file.parent / text).exists() or Path(text).expanduser().exists()
            if not found and _is_path(name, text, file.parent):
                hint = f"; run: {command('prepare', name_as_typed)}" if name == "data.prepared" else ""
                raise UsageError(f"{file}: {name} {text}: no such file or folder{_where(text, file)}{hint}")


def _where(text: str, file: Path) -> str:
    """In which folders a path was looked for; nobody keeps data beside a shipped recipe."""
    beside, here = (file.parent / text).absolute(), Path(text).expanduser()
    if here.is_absolute():
        return ""
    if file.parent == RECIPES or beside.resolve() == here.resolve():
        return f" in {Path.cwd()}"
    return f": looked for {beside}, beside the recipe, and for {here.absolute()}"


def _block(values: dict, name: str) -> dict:
    block = values.get(name)
    return dict(block) if isinstance(block, dict) else {}


def _places(base: dict, data: dict, only: str | None = None) -> Iterator[tuple[dict, str]]:
    """(mapping, key) of every text that may be a path; the lists and mappings on the way are copied first."""
    for name in KEYS:
        block, _, key = name.partition(".")
        values = base if block == "base" else data
        if only not in (None, name):
            continue
        if name == "data.mix" and isinstance(values.get(key), list):
            values[key] = [dict(source) if isinstance(source, dict) else source for source in values[key]]
            found = [(source, "dataset") for source in values[key] if isinstance(source, dict)]
        else:
            found = [(values, key)]
        for mapping, inner in found:
            text = mapping.get(inner)
            if isinstance(text, str) and text and (name != "data.chat_template" or text.endswith(".jinja")):
                yield mapping, inner


def _from_here(path: Path, written: str) -> str:
    """As it is written where that means the same here, else from the working folder on, or absolute outside of it."""
    if path.resolve() == Path(written).resolve():
        return written
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 (takes out `..`, which Path.absolute keeps)
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)


def _is_path(name: str, text: str, folder: Path) -> bool:
    """Whether a text cannot be ORGANISATION/NAME on the Hub, or its folder shows that it is not meant so."""
    if name in ("data.prepared", "data.chat_template") or text.startswith((".", "/", "~")) or text.count("/") != 1:
        return True
    parent = Path(text).parent
    return bool(_DATA_FILE.search(text)) or parent.is_dir() or (folder / parent).is_dir()
