"""Every key that `--set` takes."""

from types import UnionType
from typing import get_args

from pydantic import BaseModel

from fitune.config.installed_names import sft_config_fields
from fitune.config.recipe import Recipe
from fitune.config.schema import Profile
from fitune.config.training_fields import OWNED_ELSEWHERE, REFUSED


def set_keys() -> list[str]:
    """Keys of a recipe, `training.` with those of SFTConfig that a recipe may set, `profile.` with a profile's."""
    training = [f"training.{name}" for name in sft_config_fields() if name not in OWNED_ELSEWHERE | REFUSED]
    recipe = [key for key in _keys(Recipe) if key != "training"]
    return [*recipe, *training, *_keys(Profile, "profile.")]


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Those of blocks in it too, which stand alone or may be null; a list of blocks is one value."""
    found = []
    for name, field in model.model_fields.items():
        kinds = get_args(field.annotation) if isinstance(field.annotation, UnionType) else (field.annotation,)
        blocks = [kind for kind in kinds if _is_block(kind)]
        found += [key for block in blocks for key in _keys(block, f"{prefix}{name}.")] or [f"{prefix}{name}"]
    return found


def _is_block(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
