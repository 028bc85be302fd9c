"""What a shell completes beside commands, options, files and folders. Nothing heavy is imported for it."""

from pathlib import Path

from click.shell_completion import BashComplete, get_completion_class

SHOWS_A_RESULT = ("run.yaml", "config.json", "adapter_config.json")
"A folder with one of these files is a run, a model or an adapter."


def completion_script(shell: str, cli, program: str, variable: str) -> str:
    """For bash, zsh or fish. In bash no space follows what is to be typed on: a key's `=`, a folder's `/`.

    Bash puts quotes or backslashes around spaces in what it takes for the name of a file.
    """
    script = get_completion_class(shell)(cli, {}, program, variable).source()
    if shell == BashComplete.name:
        add = "COMPREPLY+=($value)"
        more = ("[[ $value == *[=/] ]] && compopt -o nospace", "[[ $value == *' '* ]] && compopt -o filenames")
        script = script.replace(add, "\n            ".join([add, *more]))
    return script


def complete_recipe(ctx, param, incomplete: str) -> list[str]:
    """Shipped names and files with a recipe in them."""
    from fitune.config.catalogue import completed
    from fitune.config.shipped import RECIPES

    return completed(RECIPES, "recipe", incomplete)


def complete_recipe_or_run(ctx, param, incomplete: str) -> list[str]:
    found = complete_recipe(ctx, param, incomplete)
    return [*found, *(path for path in complete_result(ctx, param, incomplete) if path not in found)]


def complete_profile(ctx, param, incomplete: str) -> list[str]:
    """Of the shipped ones those that go with the recipe that was typed before, where one was; and files."""
    from fitune.config import run as runs
    from fitune.config.catalogue import completed
    from fitune.config.shipped import PROFILES, names
    from fitune.errors import UsageError

    found = completed(PROFILES, "profile", incomplete)
    typed = ctx.params.get("recipe") or next(iter(ctx.args), "")  # click stops parsing at an option without its value
    try:
        recipe = runs.load_recipe(typed)
    except UsageError:
        return found
    others = {name for name in names(PROFILES) if not runs.goes_with(recipe, runs.load_profile(name))}
    return [name for name in found if name not in others]


def complete_key(ctx, param, incomplete: str) -> list[str]:
    """Keys of recipe and profile, with the `=` behind which their value stands."""
    from fitune.config.set_keys import set_keys

    return [f"{key}=" for key in set_keys() if key.startswith(incomplete)]


def complete_gpu(ctx, param, incomplete: str) -> list[str]:
    """The table's GPUs, as --gpu takes them without quotes: RTX-4090."""
    from fitune.planning.gpu_models import GPU_MODELS

    names = [model.name.replace(" ", "-") for model in GPU_MODELS]
    return [name for name in names if name.lower().startswith(incomplete.lower())]


def complete_result(ctx, param, incomplete: str) -> list[str]:
    """Runs, models and adapters; GGUF files; the folders on the way to them. At first also what is in runs/."""
    parent, _, start = incomplete.rpartition("/")
    found = sorted(Path(parent or ("/" if incomplete.startswith("/") else ".")).glob(f"{start}*"))
    if incomplete and "runs".startswith(incomplete):
        found += sorted(Path("runs").glob("*"))
    found = [path for path in found if not path.name.startswith(".")]
    files = [str(path) for path in found if path.suffix == ".gguf"]
    return [*files, *(f"{path}{'' if _is_result(path) else '/'}" for path in found if path.is_dir())]


def _is_result(folder: Path) -> bool:
    return any((folder / name).is_file() for name in SHOWS_A_RESULT)
