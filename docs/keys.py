"""Writes docs/keys.md: every key of recipes, profiles and accelerate configs, from what fitune checks them against.

python docs/keys.py [--check]
"""

import ast
import re
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pydantic import BaseModel

from fitune.config import evaluation, optimizers, recipe, schedules, schema, trackers
from fitune.config.installed_names import sft_config_fields, training_enums
from fitune.config.training_fields import CHOICES, LIMITS, OWNED_ELSEWHERE, REFUSED

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "keys.md"
HEAD = """# Every key

`python docs/keys.py` writes this page from `fitune/config/`, which checks each file before anything is loaded.
An unknown key is an error that names the file, the line and the nearest key.

A recipe's key is changed with `--set KEY=VALUE`, a profile's with `--set profile.KEY=VALUE`:

```
python cli.py train llama3_8b_qlora --profile single_gpu --set lora.r=32 --set profile.kept_layers=8
```
"""
EXTENDS = (
    "| `extends` | text | null | Another recipe, by name or path, whose keys this one has too. Not with `--set`. |"
)
TRAINING = """## `training:`, fields of TRL's SFTConfig

A recipe sets these under `training:`, by their own names. What each does is said where they come from:
[TRL's SFTConfig](https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig) and
[transformers' TrainingArguments](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments).
What is allowed is checked before anything is loaded.

| key | type, in Python's words | allowed |
|---|---|---|"""
ACCELERATE = """## Accelerate config

A file in `accelerate_configs/` says how processes start. It is accelerate's own file, which `accelerate launch`
reads as it is. It also needs `distributed_type: FSDP`, and `fsdp_version: 2` in its `fsdp_config:` block if it has one.
`machine_rank`, `main_process_ip` and `main_process_port` are passed on to accelerate.

| key | value | default | meaning |
|---|---|---|---|"""
IN_ACCELERATE = {
    "offload_params": "fsdp_config.fsdp_offload_params",
    "reshard_after_forward": "fsdp_config.fsdp_reshard_after_forward",
}
"What accelerate calls what the schema calls otherwise."
TYPES = {"string": "text", "boolean": "true or false", "integer": "whole number", "number": "number", "null": "null"}
BOUNDS = {"exclusiveMinimum": "above", "minimum": "from", "exclusiveMaximum": "below", "maximum": "up to"}


def docstrings() -> dict[str, dict[str, str]]:
    """The text under each field of the schema, by class and field."""
    parsed = [ast.parse(Path(module.__file__).read_text(encoding="utf-8")) for module in (recipe, schema)]
    found = {}
    for block in (node for tree in parsed for node in tree.body if isinstance(node, ast.ClassDef)):
        texts = found[block.name] = {}
        for field, below in zip(block.body, [*block.body[1:], None], strict=True):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and is_text:
                texts[field.target.id] = " ".join(below.value.value.split())
    return found


def rows_of(model: type[BaseModel], prefix: str = "") -> list[str]:
    """One row of a table for each key of a block, those of the blocks in it after it."""
    texts, described = docstrings()[model.__name__], model.model_json_schema()
    required, rows = described.get("required", ()), []
    for name in model.model_fields:
        if name not in texts:
            raise SystemExit(f"{model.__module__}: {model.__name__}.{name} has no text under it that says what it is")
        given = described["properties"][name]
        default = "**needed**" if name in required else _shown(given.get("default"))
        rows.append(f"| `{prefix}{name}` | {_cell(_value(given))} | {default} | {_cell(texts[name])} |")
        for block, between in _blocks_in(given):
            rows += rows_of(getattr(recipe, block, None) or getattr(schema, block), f"{prefix}{name}{between}.")
    return rows


def _blocks_in(given: dict) -> list[tuple[str, str]]:
    """The blocks that a key holds, by class, each with what stands between its key and theirs."""
    parts = [(part, "") for part in (given, *given.get("anyOf", ()))]
    parts += [(given.get("items", {}), "[]")]
    parts += [(given["additionalProperties"], ".RECIPE")] if isinstance(given.get("additionalProperties"), dict) else []
    return [(part["$ref"].rpartition("/")[2], between) for part, between in parts if "$ref" in part]


def _value(given: dict) -> str:
    """What a key may hold, in words."""
    if "anyOf" in given:
        return " or ".join(dict.fromkeys(_value(part) for part in given["anyOf"]))
    if "enum" in given or "const" in given:
        return ", ".join(f"`{value}`" for value in given.get("enum", [given.get("const")]))
    if "$ref" in given:
        return "block"
    if given.get("type") == "array":
        return f"list of {_value(given['items'])}"
    if given.get("type") == "object":
        held = given.get("additionalProperties")
        return f"name: {_value(held)}" if isinstance(held, dict) else "name: value"
    if "type" not in given:
        return "any"
    limits = [f"{words} {given[key]:.12g}" for key, words in BOUNDS.items() if key in given]
    return " ".join([TYPES[given["type"]], *limits])


def _quoted(values: Iterable) -> str:
    return ", ".join(f"`{value}`" for value in values)


def _shown(value) -> str:
    if value is None:
        return "null"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _allowed(name: str, annotation: str) -> str:
    """Which values of a field of SFTConfig fitune takes, where it says more than the type."""
    if name == "optim":
        return _quoted(optimizers.ARGUMENTS)
    if name == "optim_args":
        lists = (f"{name}: {', '.join(keys)}" for name, keys in optimizers.ARGUMENTS.items() if keys)
        return "`key=value,key=value`; " + "; ".join(lists)
    if name == "lr_scheduler_type":
        return _quoted(schedules.ARGUMENTS)
    if name == "lr_scheduler_kwargs":
        return "; ".join(f"{name}: {', '.join(keys)}" for name, keys in schedules.ARGUMENTS.items() if keys)
    if name == "metric_for_best_model":
        return _quoted(evaluation.METRICS)
    if name == "report_to":
        return _quoted(["none", "all", *trackers.PACKAGES])
    if name in CHOICES:
        return _quoted(CHOICES[name])
    enums = [training_enums()[part] for part in re.split(r"[\s|]+", annotation) if part in training_enums()]
    if enums:
        return _quoted(enums[0])
    return LIMITS[name][1] if name in LIMITS else ""


def accelerate_rows() -> list[str]:
    rows = [row for row in rows_of(schema.AccelerateConfig) if not row.startswith("| `path`")]
    return [re.sub(r"`(\w+)`", lambda name: f"`{IN_ACCELERATE.get(name[1], name[1])}`", row, count=1) for row in rows]


def training_rows() -> list[str]:
    fields = {name: kind for name, kind in sft_config_fields().items() if name not in OWNED_ELSEWHERE | REFUSED}
    return [
        f"| `training.{name}` | {_cell(kind)} | {_cell(_allowed(name, kind))} |"
        for name, kind in sorted(fields.items())
    ]


def page() -> str:
    table = "| key | value | default | meaning |\n|---|---|---|---|"
    parts = [
        HEAD,
        f"## Recipe\n\n{recipe.Recipe.__doc__}\n",
        "\n".join([table, EXTENDS, *rows_of(recipe.Recipe)]),
        f"\n## Memory profile\n\n{schema.Profile.__doc__}\n",
        "\n".join([table, *rows_of(schema.Profile)]),
        "\n" + "\n".join([TRAINING, *training_rows()]),
        "\n[settings.md](settings.md) says what each does when tried, and which fields are set elsewhere or refused.\n",
        "\n" + "\n".join([ACCELERATE, *accelerate_rows()]),
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    if "--check" not in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit(f"{PAGE.relative_to(ROOT)} is out of date; run: python docs/keys.py")


if __name__ == "__main__":
    main()
