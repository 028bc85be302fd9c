"""Reads a YAML file into a typed pydantic model; every mistake names the file, the key and the nearest valid name."""

from pathlib import Path
from typing import TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from fitune.errors import UsageError, nearest

Model = TypeVar("Model", bound=BaseModel)


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where PyYAML would keep the last one without a word."""


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


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_of_unique_keys)


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file. Raises UsageError for a missing, broken or non-mapping file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    try:
        data = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UsageError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path}: expected 'key: value' lines, found {type(data).__name__}")
    return data


def parse(model: type[Model], data: dict, source: str) -> Model:
    """`model` built from `data`; `source` (a file or `--set`) is named in every error."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UsageError(_describe(error, model, data, source)) from None


def _describe(error: ValidationError, model: type[BaseModel], data: dict, source: str) -> str:
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
        owner = _model_at(model, keys[:-1])
        return f"{source}: unknown key '{key}'{nearest(keys[-1], owner.model_fields if owner else ())}{more}"
    if first["type"] == "missing":
        return f"{source}: key '{key}' is missing{more}"
    message = first["msg"].removeprefix("Value error, ")
    given = "" if isinstance(first["input"], (dict, list)) else f", not {first['input']!r}"
    return f"{source}: {key + ': ' if key else ''}{message}{given if key else ''}{more}"


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
