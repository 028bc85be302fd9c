"""Reads a YAML file into a typed pydantic model; every mistake names the file, the key and the nearest valid name."""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from fitune.errors import UsageError, closest, nearest

Model = TypeVar("Model", bound=BaseModel)
Where = Callable[[Sequence], str]
"Names the place where the value at a path of keys was written."
FEW = 8
"So many allowed values are all named where another is given."


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where PyYAML would keep the last one without a word.

    `yes`, `no`, `on` and `off` stay words, as in YAML 1.2: some fields mean the word. 2e-4 is a number, a date is text.
    """


_BOOL, _FLOAT, _DATE = (f"tag:yaml.org,2002:{kind}" for kind in ("bool", "float", "timestamp"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _DATE)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF"))
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789"))


def _mapping_of_unique_keys(loader, node, deep=False):
    seen = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key_node.start_mark)
        if key_node.value in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key '{key_node.value}' is given twice", key_node.start_mark
            )
        seen.add(key_node.value)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_of_unique_keys)


def _number_or_text(loader, node):
    """What begins like a number may still be none: 2e-4x is text, and its field says what it expects."""
    try:
        return yaml.SafeLoader.construct_yaml_float(loader, node)
    except ValueError:
        return node.value


_Loader.add_constructor(_FLOAT, _number_or_text)


def parse_yaml(text: str) -> Any:
    """What a YAML text says. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file. Raises UsageError for a missing, broken or non-mapping file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: no text in UTF-8; expected YAML") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    try:
        data = parse_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UsageError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(data, dict):
        found = "the file is empty" if data is None else f"found {type(data).__name__}"
        raise UsageError(f"{path}: expected 'key: value' lines, {found}")
    return data


def line_of(path: Path, keys: Sequence) -> int:
    """The line, from 1 on, where a YAML file gives what is at `keys`; the nearest key above it where it doesn't."""
    node, line = _composed(path.read_text(encoding="utf-8")), 1
    for key in keys:
        if isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = node.start_mark.line + 1
            continue
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        found = next((pair for pair in pairs if pair[0].value == str(key)), None)
        if found is None:
            break
        line, node = found[0].start_mark.line + 1, found[1]
    return line


@lru_cache(maxsize=16)
def _composed(text: str) -> yaml.Node:
    """Kept, as the place of each key is asked for."""
    return yaml.compose(text, Loader=_Loader)


def parse(
    model: type[Model], data: dict, source: str | Where, hinted: Callable[[str], str | None] = lambda key: None
) -> Model:
    """`model` built from `data`; `source` (a file or `--set`), or what it says of a key's path, begins every error.

    `hinted` says what to do about an unknown key, where it knows; else the nearest known key is named.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UsageError(_describe(error, model, data, source, hinted)) from None


def place_of(source: str | Where, keys: Sequence) -> str:
    """What an error about the value at `keys` begins with."""
    return source if isinstance(source, str) else source(keys)


def _describe(error: ValidationError, model: type[BaseModel], data: dict, source: str | Where, hinted) -> str:
    found = [(_keys(entry, data), entry) for entry in error.errors()]
    # a misspelt key is also a missing one: the spelling is the better thing to say
    keys, _ = min(found, key=lambda one: one[1]["type"] != "extra_forbidden")
    # where one of several types may stand, the error deepest inside is of the type that was meant
    keys, first = max((one for one in found if one[0][: len(keys)] == keys), key=lambda one: len(one[0]))
    places = {tuple(other) for other, _ in found}
    innermost = [place for place in places if not any(place == other[: len(place)] for other in places - {place})]
    key = ".".join(map(str, keys))
    more = f" (and {len(innermost) - 1} more)" if len(innermost) > 1 else ""
    if first["type"] == "extra_forbidden":
        source = place_of(source, keys)
        owner = _model_at(model, keys[:-1])
        allowed, block = owner.model_fields if owner else (), key.removesuffix(str(keys[-1]))
        hint = hinted(key) or nearest(keys[-1], allowed, within=block)
        return f"{source}: unknown key '{key}'{hint}{more}"
    if first["type"] == "missing":
        missing = [".".join(map(str, keys)) for keys, entry in found if entry["type"] == "missing"]
        said = f"keys {', '.join(map(repr, missing))} are" if len(missing) > 1 else f"key '{key}' is"
        others = len(innermost) - len(missing)
        source = place_of(source, [])
        return f"{source}: {said} missing{f' (and {others} more mistakes)' if others else ''}"
    source = place_of(source, keys)
    message = first["msg"].removeprefix("Value error, ")
    if isinstance(first["input"], str) and _takes_a_list(model, keys):
        if word := next((word for word in _words(model, keys) if word.startswith(first["input"])), None):
            return f"{source}: {key}: unknown value '{first['input']}'; did you mean '{word}'?{more}"
        listed = ", ".join(part.strip() for part in first["input"].split(","))
        return f"{source}: {key}: a list needs brackets: [{listed}]{more}"
    if first["type"] == "model_type" and (block := _model_at(model, keys)):
        names = ", ".join(f"{key}.{name}" for name in block.model_fields)
        return f"{source}: {key} is a block of keys, not {first['input']!r}; set one of {names}{more}"
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        allowed = re.findall(r"'([^']*)'", message)
        word = first["input"].lower()
        listed = f" (allowed: {', '.join(allowed)})" if len(allowed) <= FEW and closest(word, allowed) else ""
        return f"{source}: {key}: unknown value '{first['input']}'{listed}{nearest(word, allowed)}{more}"
    given = "" if isinstance(first["input"], (dict, list)) else f", not {first['input']!r}"
    words = "" if first["type"] == "literal_error" else "".join(f" or {word}" for word in _words(model, keys))
    return f"{source}: {key + ': ' if key else ''}{message}{words}{given if key else ''}{more}"


def _takes_a_list(model: type[BaseModel], keys: list[str | int]) -> bool:
    owner = _model_at(model, keys[:-1])
    field = owner.model_fields.get(str(keys[-1])) if owner else None
    return field is not None and any(
        get_origin(kind) is list for kind in (field.annotation, *get_args(field.annotation))
    )


def _words(model: type[BaseModel], keys: list[str | int]) -> list[str]:
    """That may stand in the place of another type, such as `all-linear` for a list, or `auto` for a number."""
    owner = _model_at(model, keys[:-1])
    field = owner.model_fields.get(str(keys[-1])) if owner and keys else None
    kinds = get_args(field.annotation) if field else ()
    return [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]


def _keys(entry: dict, data) -> list[str | int]:
    """Where an error is in the file: pydantic's location without the types it tried there."""
    keys = []
    for part in entry["loc"]:
        if (isinstance(data, dict) and part in data) or (isinstance(data, list) and isinstance(part, int)):
            data = data[part]
            keys.append(part)
    if entry["loc"][-1:] == ("[key]",):
        return [*keys, entry["loc"][-2]]
    return [*keys, entry["loc"][-1]] if entry["type"] in ("missing", "invalid_key") else keys


def _model_at(model: type[BaseModel], location) -> type[BaseModel] | None:
    """The pydantic model that owns the keys at `location`, looking through `X | None` and lists."""
    for part in location:
        if isinstance(part, str) and model:
            field = model.model_fields.get(part)
            model = _model_in(field.annotation) if field else None
    return model


def _model_in(annotation) -> type[BaseModel] | None:
    """The first pydantic model that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)
