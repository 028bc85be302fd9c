"""From names on the command line to one resolved run: run.yaml."""

import math
import os
from pathlib import Path
from typing import Any

import yaml

from fitune import __version__
from fitune.config.accelerate_config import read_accelerate_config
from fitune.config.command_name import command
from fitune.config.hints import became, meant_by
from fitune.config.ignored import refuse_ignored
from fitune.config.model_shapes import find_shape
from fitune.config.model_sizes import is_of_size
from fitune.config.optimizers import is_adamw
from fitune.config.recipe import Recipe
from fitune.config.recipe_files import joined, read_recipe_files, refuse_missing_paths, values_of, where_written
from fitune.config.recipe_paths import found_beside, path_from_here
from fitune.config.results import refuse_what_runs_leave
from fitune.config.schema import AUTO, SMALLEST, AccelerateConfig, Profile, Run
from fitune.config.shipped import ACCELERATE_CONFIGS, PROFILES, find, is_path, name_of, names
from fitune.config.training_block import check_training_block, refuse_what_needs_a_gpu, taken_away
from fitune.config.yaml_file import Where, parse, parse_yaml, read_yaml
from fitune.errors import UsageError

FOUND = "accelerate.yaml"
"The accelerate config of a run that `plan` found: it lies in the run's folder."


def parse_sets(sets: tuple[str, ...]) -> tuple[dict, dict]:
    """`--set key=value` flags as nested overrides for (recipe, profile); `profile.` starts a profile key."""
    overrides: dict[str, Any] = {}
    for item in sets:
        key, equals, text = item.partition("=")
        if not equals or not all(key.split(".")):
            raise UsageError(f"--set {item}: expected key=value, for example --set training.learning_rate=1e-4")
        if not text.strip():
            raise UsageError(f"--set {item}: {key} has no value; give one, or null to take away what a recipe has")
        try:
            value = parse_yaml(text)
        except yaml.YAMLError:
            raise UsageError(f"--set {item}: the value is not valid YAML") from None
        target = overrides
        *parents, last = key.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise UsageError(f"--set {item}: '{parent}' already has a value")
        before = target.get(last)
        if isinstance(before, dict) and not isinstance(value, dict):
            raise UsageError(f"--set {item}: keys of '{key}' are set before; give it once")
        target[last] = joined(before, value) if isinstance(before, dict) else value
    profile = overrides.pop("profile", {})
    if not isinstance(profile, dict):
        raise UsageError(f"--set profile={profile}: name a key of the profile, as in profile.micro_batch=2")
    return overrides, profile


def load_recipe(name: str, overrides: dict | None = None) -> Recipe:
    """A recipe by name or path, with overrides applied.

    It has the keys of the recipe that it extends, if any (`fitune.config.recipe_files`). Relative paths inside it are
    looked for beside it, then in the working folder (`fitune.config.recipe_paths`).
    """
    files, overrides = read_recipe_files(name), overrides or {}
    where = where_written(files, overrides)
    layers = [values.get("training") or {} for values in (overrides, *(file.values for file in files))]
    recipe = _checked(joined(values_of(files), overrides), layers, where)
    refuse_ignored(recipe.training, layers, where)
    return recipe


def _checked(values: dict, layers: list, source: str | Where) -> Recipe:
    """`layers`: the `training:` blocks that `values` were made of."""
    if isinstance(values.get("training"), dict):
        values |= {"training": taken_away(values["training"], [block for block in layers if isinstance(block, dict)])}
    recipe = parse(Recipe, values, source, meant_by)
    return recipe.model_copy(update={"training": check_training_block(recipe, source)})


def check_paths(name: str, sets: tuple[str, ...], *keys: str) -> None:
    """Raises UsageError, which says where it looked, if a path that a recipe has under one of `keys` leads nowhere."""
    refuse_missing_paths(read_recipe_files(name), parse_sets(sets)[0], name, keys)


def load_profile(name: str, overrides: dict | None = None) -> Profile:
    """A memory profile by name or path, with overrides applied.

    The path of an accelerate config in it is looked for beside it, then in the working folder.
    """
    path = find(name, PROFILES, "memory profile")
    values = read_yaml(path)
    if is_path(str(values.get("accelerate_config"))):
        values = path_from_here(values, "accelerate_config", path.parent)
    return parse(Profile, joined(values, overrides or {}), f"{path}{' with --set' if overrides else ''}", became)


def goes_with(recipe: Recipe, profile: Profile) -> bool:
    """Whether a profile is meant for a recipe: its method, at the size of its model."""
    try:
        parameters = find_shape(recipe.base.model, recipe.base.revision).parameters
    except UsageError:
        parameters = None
    return any(recipe.method in methods for size, methods in profile.fits.items() if is_of_size(parameters, size))


def resolve(recipe_name: str, profile_name: str, sets: tuple[str, ...] = (), output: str | None = None) -> Run:
    """The run that a recipe, a profile, `--set` flags and an output folder describe. Raises UsageError.

    What the profile leaves to `plan` has its smallest value: `fitune.planning.fill.resolve` is this with it chosen.
    """
    recipe_overrides, profile_overrides = parse_sets(sets)
    recipe = load_recipe(recipe_name, recipe_overrides)
    recipe_stem, profile_stem = name_of(recipe_name), name_of(profile_name)
    profile = load_profile(profile_name, profile_overrides)
    accelerate = read_accelerate_config(find(profile.accelerate_config, ACCELERATE_CONFIGS, "accelerate config"))
    _check_pair(recipe_stem, recipe, profile_stem, profile, accelerate)
    output = str(Path(output or f"runs/{recipe_stem}-{profile_stem}").absolute())
    return run_of(recipe_stem, recipe, profile_stem, profile, accelerate, output)


def resolve_again(folder: Path, profile_name: str | None = None, sets: tuple[str, ...] = ()) -> Run:
    """The run of a folder as it was, but for another profile and what `--set` flags change. Raises UsageError."""
    old, (recipe_overrides, profile_overrides) = load(folder), parse_sets(sets)
    source = f"{folder / 'run.yaml'}{' with --set' if sets else ''}"
    changed = recipe_overrides.get("training") or {}
    recipe = _checked(joined(old.recipe.model_dump(), recipe_overrides), [changed, old.recipe.training], source)
    refuse_ignored(recipe.training, [changed], source)
    if profile_name:
        profile = load_profile(profile_name, profile_overrides)
    else:
        profile = parse(Profile, joined(old.profile.model_dump(), profile_overrides), source, became)
    if profile_name or "accelerate_config" in profile_overrides:
        accelerate_file = find(profile.accelerate_config, ACCELERATE_CONFIGS, "accelerate config")
    else:
        accelerate_file = Path(old.accelerate.path)
    accelerate = read_accelerate_config(accelerate_file)
    if accelerate == old.accelerate.model_copy(update={"reshard_after_forward": AUTO}):
        accelerate = old.accelerate  # with what `plan` chose
    profile_stem = name_of(profile_name or old.profile_name)
    _check_pair(old.recipe_name, recipe, profile_stem, profile, accelerate)
    return run_of(old.recipe_name, recipe, profile_stem, profile, accelerate, old.output_dir)


def run_of(
    recipe_name: str, recipe: Recipe, profile_name: str, profile: Profile, accelerate: AccelerateConfig, output: str
) -> Run:
    """A run of checked parts. Raises UsageError for what cannot go together."""
    _refuse_unfit_states(recipe_name, recipe, profile, accelerate)
    _refuse_replicas_across_machines(profile, accelerate)
    smallest = {key: SMALLEST[key] for key in profile.left_to_plan}
    numbers = profile.model_copy(update=smallest)
    return Run(
        fitune=__version__,
        recipe_name=recipe_name,
        profile_name=profile_name,
        output_dir=output,
        working_folder=os.path.relpath(Path.cwd(), output),
        recipe=recipe,
        profile=numbers,
        accelerate=accelerate,
        gradient_accumulation_steps=_gradient_accumulation(recipe, numbers, accelerate),
        left_to_plan=profile.left_to_plan,
    )


def in_folder(run: Run, output: str) -> Run:
    """The same run, to be written to another folder."""
    return run.model_copy(update={"output_dir": output, "working_folder": os.path.relpath(Path.cwd(), output)})


def _refuse_replicas_across_machines(profile: Profile, accelerate: AccelerateConfig) -> None:
    """Raises UsageError if copies of the model would not be equal parts of machines, or whole machines."""
    allowed = possible_replicas(accelerate.num_processes, accelerate.num_machines)
    if profile.replicas not in (AUTO, *allowed):
        machines = f"{accelerate.num_machines} machine{'s' * (accelerate.num_machines > 1)}"
        raise UsageError(
            f"profile.replicas {profile.replicas}: {accelerate.path} has {accelerate.num_processes} processes on "
            f"{machines}, which can hold {', '.join(map(str, allowed))} or auto"
        )


def possible_replicas(ranks: int, machines: int) -> list[int]:
    """The numbers of copies that share the ranks evenly, each on whole machines or on a part of one; fewest first."""
    each = ranks // machines
    counts = (count for count in range(1, ranks + 1) if ranks % count == 0)
    return [count for count in counts if (shards := ranks // count) % each == 0 or each % shards == 0]


def _refuse_unfit_states(recipe_name: str, recipe: Recipe, profile: Profile, accelerate: AccelerateConfig) -> None:
    """Raises UsageError where small optimizer states are asked for and something else needs the usual ones."""
    if profile.optimizer_offload and accelerate.offload_params:
        raise UsageError(
            f"profile.optimizer_offload keeps the weights on the GPU, {accelerate.path} has fsdp_offload_params true, "
            f"which takes gradients and states along; use --set profile.optimizer_offload=false"
        )
    if profile.optimizer_state == "fp32":
        if profile.optimizer_offload:
            raise UsageError(
                "profile.optimizer_offload is for small optimizer states; add --set profile.optimizer_state=bf16_8bit, "
                "or use --set profile.optimizer_offload=false"
            )
        return
    instead = "use --set profile.optimizer_state=fp32"
    if recipe.method != "full":
        raise UsageError(
            f"profile.optimizer_state {profile.optimizer_state} is for method full, recipe {recipe_name} is "
            f"{recipe.method}, whose adapter's states are small anyway; {instead}"
        )
    if not is_adamw(recipe.training):
        raise UsageError(
            f"profile.optimizer_state {profile.optimizer_state} is AdamW's, recipe {recipe_name} has training.optim "
            f"{recipe.training['optim']}; remove it, or {instead}"
        )


def with_numbers(run: Run, **numbers: int) -> Run:
    """The run with a micro batch, kept layers or both in place of what its profile left to `plan`."""
    profile = run.profile.model_copy(update=numbers)
    return run.model_copy(
        update={
            "profile": profile,
            "gradient_accumulation_steps": _gradient_accumulation(run.recipe, profile, run.accelerate),
            "left_to_plan": tuple(key for key in run.left_to_plan if key not in numbers),
        }
    )


def with_activations(run: Run, *, kept_attention: bool, activation_offload: bool) -> Run:
    """The run with yes or no for both."""
    values = {"kept_attention": kept_attention, "activation_offload": activation_offload}
    return run.model_copy(update={"profile": run.profile.model_copy(update=values)})


def with_resharding(run: Run, value: bool) -> Run:
    """The run with yes or no for `reshard_after_forward`."""
    return run.model_copy(update={"accelerate": run.accelerate.model_copy(update={"reshard_after_forward": value})})


def _check_pair(recipe_name, recipe: Recipe, profile_name, profile: Profile, accelerate: AccelerateConfig) -> None:
    refuse_what_needs_a_gpu(recipe.training, use_cpu=accelerate.use_cpu)
    if recipe.method not in profile.methods:
        fitting = [name for name in names(PROFILES) if goes_with(recipe, load_profile(name))]
        raise UsageError(
            f"profile {profile_name} is for {', '.join(sorted(profile.methods))}, recipe {recipe_name} is "
            f"{recipe.method}; profiles for it: {', '.join(fitting) or 'none'}"
        )
    if profile.num_gpus and profile.num_gpus != accelerate.num_processes:
        raise UsageError(
            f"profile {profile_name} has num_gpus {profile.num_gpus}, {accelerate.path} has num_processes "
            f"{accelerate.num_processes}: make them equal"
        )
    if profile.embedding_offload and recipe.method == "full":
        raise UsageError(
            f"profile {profile_name}: embedding_offload is for a frozen base, recipe {recipe_name} is full"
        )
    if bool(profile.num_gpus) == accelerate.use_cpu:
        raise UsageError(
            f"profile {profile_name} has num_gpus {profile.num_gpus}, but {accelerate.path} "
            f"has use_cpu: {str(accelerate.use_cpu).lower()}"
        )


def micro_batches(recipe: Recipe, accelerate: AccelerateConfig) -> list[int]:
    """Rows per process and pass worth trying, ascending: for each number of passes, the fewest that are enough."""
    most = math.ceil(recipe.global_batch_size / accelerate.num_processes)
    return sorted({math.ceil(most / passes) for passes in range(1, most + 1)})


def _gradient_accumulation(recipe: Recipe, profile: Profile, accelerate: AccelerateConfig) -> int:
    """Passes per step. Filler rows, which count nothing, take the places that are left in the last one."""
    batch, processes, rows = recipe.global_batch_size, accelerate.num_processes, profile.micro_batch
    most = math.ceil(batch / processes)
    if rows > most:
        raise UsageError(
            f"micro_batch {rows} is more than each of {processes} process{'es' * (processes > 1)} has of "
            f"global_batch_size {batch}; use --set profile.micro_batch={most}"
        )
    return math.ceil(batch / (rows * processes))


def dump(run: Run) -> str:
    """run.yaml's text."""
    header = (
        f"# One resolved run. Start it with:\n# python -m accelerate.commands.launch --config_file "
        f"{run.accelerate.path} -m fitune.training.train run.yaml\n"
    )
    return header + in_yaml(run)


def in_yaml(run: Run, width: int = 120) -> str:
    """Lines of at most `width` columns, where a space lets a longer one be parted."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=width)


def load(path: Path) -> Run:
    """A run.yaml, or the run folder that holds one."""
    refuse_what_runs_leave(path)
    path = path / "run.yaml" if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"{path}: no such file; expected {_checkpoint_meant(path)}")
    content = read_yaml(path) | {"output_dir": str(path.absolute().parent)}  # it may have moved
    if all(isinstance(content.get(part), dict) for part in ("profile", "accelerate")):
        _turn_earlier_keys(content["profile"], content["accelerate"])
        if content["profile"].get("accelerate_config") == FOUND:
            content["accelerate"] |= {"path": str(path.absolute().parent / FOUND)}
    run = parse(Run, _seen_from_here(content), str(path))
    _refuse_replicas_across_machines(run.profile, run.accelerate)
    return run


def _turn_earlier_keys(profile: dict, accelerate: dict) -> None:
    """What runs of earlier versions had in place of kept_layers, on which no result hangs, and of replicas."""
    profile.pop("activation_checkpointing", None)
    profile.setdefault("kept_layers", 0)
    by_machine = profile.pop("hybrid_sharding", False) is True
    profile.setdefault("replicas", accelerate.get("num_machines", 1) if by_machine else 1)


def _checkpoint_meant(path: Path) -> str:
    """What to give in place of a path that leads nowhere: a checkpoint may have been looked for beside the adapter."""
    folder = path.parent if path.name == "run.yaml" else path
    inside = folder.parent / "checkpoints" / folder.name
    return str(inside) if inside.is_dir() else f"a run folder written by `{command()} train`"


def _seen_from_here(content: dict) -> dict:
    """The contents of a run.yaml, whose relative paths start at the folder where it was written, seen from here."""
    written_in = content.get("working_folder")
    if not isinstance(written_in, str):
        return content
    there = Path(os.path.normpath(Path(content["output_dir"]) / written_in))
    changes = {"working_folder": os.path.relpath(Path.cwd(), content["output_dir"])}
    if isinstance(content.get("recipe"), dict):
        changes["recipe"] = found_beside(content["recipe"], there)
    if isinstance(content.get("accelerate"), dict):
        changes["accelerate"] = path_from_here(content["accelerate"], "path", there)
    return content | changes
