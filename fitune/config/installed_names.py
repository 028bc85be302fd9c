"""Names that installed libraries accept, read from their source so that nothing heavy is imported."""

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from fitune.config.shipped import how_to_install
from fitune.errors import FituneError


def _source(package: str, file: str) -> ast.Module:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise FituneError(f"{package} is not installed; run: {how_to_install(package)}")
    return ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))


def _dataclass_fields(package: str, file: str, *class_names: str) -> dict[str, str]:
    """Field name -> annotation source of dataclasses, later classes winning."""
    classes = {node.name: node for node in ast.walk(_source(package, file)) if isinstance(node, ast.ClassDef)}
    return {
        node.target.id: ast.unparse(node.annotation)
        for name in class_names
        for node in classes[name].body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


@cache
def sft_config_fields() -> dict[str, str]:
    """Every field of TRL's SFTConfig with its annotation as text."""
    return {
        **_dataclass_fields("transformers", "training_args.py", "TrainingArguments"),
        **_dataclass_fields("trl", "trainer/base_config.py", "_BaseConfig"),
        **_dataclass_fields("trl", "trainer/sft_config.py", "SFTConfig"),
    }


@cache
def training_enums() -> dict[str, tuple[str, ...]]:
    """The values of each enumeration that SFTConfig's annotations name, by the enumeration's name."""
    found = {}
    for file in ("trainer_utils.py", "training_args.py"):
        classes = (node for node in ast.walk(_source("transformers", file)) if isinstance(node, ast.ClassDef))
        for enum in classes:
            values = [node.value.value for node in enum.body if isinstance(node, ast.Assign) and _is_text(node.value)]
            if values and any(ast.unparse(base) == "ExplicitEnum" for base in enum.bases):
                found[enum.name] = tuple(values)
    return found


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@cache
def accelerate_config_keys() -> set[str]:
    """Top-level keys of an accelerate config file."""
    file = "commands/config/config_args.py"
    return set(_dataclass_fields("accelerate", file, "BaseConfig", "ClusterConfig"))


@cache
def accelerate_fsdp_keys() -> set[str]:
    """Keys of the `fsdp_config` block: the launcher's --fsdp_* flags."""
    constants = (n.value for n in ast.walk(_source("accelerate", "commands/launch.py")) if isinstance(n, ast.Constant))
    return {c.removeprefix("--") for c in constants if isinstance(c, str) and c.startswith("--fsdp_")}
