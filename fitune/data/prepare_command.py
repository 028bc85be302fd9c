"""`fitune prepare` on the command line: a recipe's data, one's own for a recipe, or rows without a recipe."""

import json
import re
import shlex
from pathlib import Path

from fitune.config import run as runs
from fitune.config.base_model import refuse_length_beyond
from fitune.config.command_name import command
from fitune.config.hub import local_config
from fitune.config.json_file import read_json
from fitune.config.recipe import Data, Recipe
from fitune.config.yaml_file import parse
from fitune.data.prepare import prepare
from fitune.data.prepared import CHOOSE_ROWS, dataset_in, read_report
from fitune.data.sources import refuse_missing_file
from fitune.errors import UsageError

OF_ITS_DATASET = (*CHOOSE_ROWS, "format", "invalid_rows")
"Keys of a recipe's `data:` that speak of its own dataset; the others say how rows are trained, of whatever data."
FLAGS = {
    "--long-rows": "data.long_rows", "--format": "data.format", "--drop-invalid": "data.invalid_rows",
    "--escape-control-tokens": "",
}  # fmt: skip
"Of `prepare`, about which rows are taken, and the key that each stands in for."
OF_TRAINING = ("profile", "training", "lora", "method", "early_stopping")
"What `--set` changes without a meaning for `prepare`."


def prepare_command(
    recipe: str | None,
    dataset: str | None,
    output: Path | None,
    sets: tuple[str, ...],
    *,
    tokenizer: str | None,
    no_tokens: bool,
    template_choice: str | None,
    max_length: int | None,
    **options,
) -> None:
    """Prepares a recipe's data, or `dataset` in its place, and says what to type next. Raises UsageError."""
    if not recipe and not dataset:
        raise UsageError(
            "give a recipe, a recipe and --dataset, or --dataset with --output to prepare rows for no recipe "
            "(see prepare --help)"
        )
    if not recipe:
        data = _data_without_recipe(dataset, output, sets)
        tokenizer = _folder_of(tokenizer) if tokenizer and not no_tokens else None
        prepare(data, output, tokenizer=tokenizer, template_choice=template_choice, max_length=max_length, **options)
        return
    resolved = runs.load_recipe(recipe, runs.parse_sets(sets)[0])
    data = with_own_dataset(resolved.data, dataset, sets) if dataset else resolved.data
    needs_base = not (no_tokens or tokenizer)
    read = [*([] if dataset else ["data.dataset", "data.mix"]), *([] if template_choice else ["data.chat_template"])]
    runs.check_paths(recipe, sets, *read, *(["base.model"] if needs_base else []))
    if dataset:
        refuse_missing_file(dataset)
    folder = None if no_tokens else _tokenizer_for(resolved, tokenizer)
    length = max_length or resolved.max_length
    if needs_base:
        _refuse_length_beyond_positions(resolved.model_copy(update={"max_length": length}), folder)
    output = Path(output or data.prepared)
    again = _repeated(sets, {"data.chat_template": template_choice, "max_length": max_length})
    again = _not_of_the_dataset(again) if dataset else again
    _refuse_the_data_of_another(output, data, recipe, again, options["overwrite"])
    prepare(
        data,
        output,
        tokenizer=folder,
        template_choice=template_choice,
        max_length=length,
        packing=resolved.packing,
        global_batch_size=resolved.global_batch_size,
        seed=resolved.seed,
        asked=_asked(dataset, sets, options),
        **options,
    )
    how = _how_to_train(recipe, again, None if output == Path(resolved.data.prepared) else output)
    options["console"].print(f"next: {how}", soft_wrap=True, highlight=False)


def how_to_prepare(recipe: str, sets: tuple[str, ...], data: Data) -> str:
    """The command that prepares a recipe's rows as before, but for what `sets` change.

    Raises UsageError where `sets` name another dataset than the rows are of: training would not read it.
    """
    folder, typed = Path(data.prepared), {each.partition("=")[0] for each in sets}
    asked, there = (read_report(folder) or {}).get("asked", {}), dataset_in(folder, data)
    dataset = None if "data.dataset" in typed else asked.get("dataset") or there
    flags = [(flag, value) for flag, value in asked.get("flags", {}).items() if FLAGS[flag] not in typed]
    changed = [each for each in sets if re.split("[.=]", each)[0] not in OF_TRAINING]
    of_own_dataset = {f"data.{key}" for key in OF_ITS_DATASET if dataset} - typed
    kept = [each for each in asked.get("sets", []) if each.partition("=")[0] in of_own_dataset] + changed
    words = [*(["--dataset", dataset] if dataset else [])]
    words += [word for flag, value in flags for word in ([flag] if value is True else [flag, str(value)])]
    again = command("prepare", recipe, *words, *(word for each in kept for word in ("--set", each)), "--overwrite")
    if there and "data.dataset" in typed:
        raise UsageError(f"{folder}: prepared from {there}, not {data.dataset}; prepare the data again: {again}")
    return again


def _asked(dataset: str | None, sets: tuple[str, ...], options: dict) -> dict:
    """For report.json: what rows were asked for by, beside the recipe."""
    given = {flag: options.get(flag[2:].replace("-", "_")) for flag in FLAGS}
    return {"dataset": dataset, "sets": list(sets), "flags": {flag: value for flag, value in given.items() if value}}


def with_own_dataset(data: Data, dataset: str, sets: tuple[str, ...] = ()) -> Data:
    """A recipe's `data:` block for another dataset: what was said of its own is as by default, or as `sets` say."""
    changed = runs.parse_sets(sets)[0].get("data", {})
    fields = {name: Data.model_fields[name].get_default(call_default_factory=True) for name in OF_ITS_DATASET}
    own = {name: changed.get(name, default) for name, default in fields.items()}
    return parse(Data, data.model_dump() | own | {"dataset": dataset}, "--dataset with the recipe's data")


def _data_without_recipe(dataset: str, output: Path | None, sets: tuple[str, ...]) -> Data:
    if not output:
        raise UsageError(
            f"--dataset needs a recipe to prepare it for, `{command('prepare', 'RECIPE', '--dataset', dataset)}`, "
            f"or --output FOLDER"
        )
    changed = runs.parse_sets(sets)[0]
    if others := [key for key in changed if key != "data"]:
        raise UsageError(f"--set {others[0]}: with --dataset there is no recipe to change but its data: block")
    values = {"dataset": dataset, "prepared": str(output), "chat_template": "plain"}
    return parse(Data, values | changed.get("data", {}), "--dataset with --set")


def _tokenizer_for(recipe: Recipe, tokenizer: str | None) -> Path:
    return _folder_of(tokenizer) if tokenizer else local_config(recipe.base.model, recipe.base.revision)


def _refuse_length_beyond_positions(recipe: Recipe, folder: Path) -> None:
    """Before rows are read that no training would take. `folder` has the base's config.json."""
    file = folder / "config.json"
    if file.is_file() and (positions := read_json(file, "get the model again").get("max_position_embeddings")):
        refuse_length_beyond(positions, recipe, recipe.base.model)


def _folder_of(tokenizer: str) -> Path:
    return Path(tokenizer) if Path(tokenizer).is_dir() else local_config(tokenizer)


def _refuse_the_data_of_another(output: Path, data: Data, recipe: str, again: list[str], overwrite: bool) -> None:
    """Where rows of another dataset are in the folder, as after `prepare RECIPE`, says whose and how to have both."""
    try:
        there = json.loads((output / "report.json").read_text(encoding="utf-8"))["source"]["dataset"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if there != data.dataset and not overwrite:
        beside = output.parent / Path(data.dataset).name.partition(".")[0]
        raise UsageError(
            f"{output}: already exists, with rows of {there}; replace them with --overwrite, or keep both: --output "
            f"{shlex.quote(str(beside))}, then {_how_to_train(recipe, again, beside)}"
        )


def _repeated(sets: tuple[str, ...], typed: dict[str, object]) -> list[str]:
    """`sets` with what other flags say in their place, as more of them."""
    given = {key: value for key, value in typed.items() if value}
    return [each for each in sets if each.partition("=")[0] not in given] + [f"{k}={v}" for k, v in given.items()]


def _not_of_the_dataset(sets: list[str]) -> list[str]:
    """Those that training checks, or goes by, whatever the rows came from."""
    of_the_dataset = {f"data.{key}" for key in ("dataset", *OF_ITS_DATASET)}
    return [each for each in sets if each.partition("=")[0] not in of_the_dataset]


def _how_to_train(recipe: str, sets: list[str], elsewhere: Path | None) -> str:
    kept = [each for each in sets if not (elsewhere and each.startswith("data.prepared="))]
    kept += [f"data.prepared={elsewhere}"] if elsewhere else []
    return command("train", recipe, *(word for each in kept for word in ("--set", each)))
