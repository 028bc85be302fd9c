"""What runs leave: given where a run itself is wanted, and whether it is whole."""

from pathlib import Path

from fitune.config.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter
from fitune.config.command_name import command
from fitune.config.gguf_files import refuse_gguf
from fitune.config.schema import Run
from fitune.errors import UsageError


def refuse_what_runs_leave(given: Path) -> None:
    """UsageError for a GGUF, an adapter's folder or a model's, which says what they are for, and for other files."""
    if (given.is_file() and given.suffix in (".yaml", ".yml")) or (given / "run.yaml").exists():
        return
    refuse_gguf(given, "run")
    if given.is_file():
        raise UsageError(f"{given}: is a file; expected a run folder written by `{command()} train`")
    whose = "an adapter's" if is_adapter(given) else "a model's" if (given / "config.json").is_file() else None
    if whose:
        raise UsageError(f"{given}: {whose} folder, no run's; expected a run folder written by `{command()} train`")


def missing_of_result(run: Run) -> Path | None:
    """The first file that the result of a run lacks; None for a whole one, and for none at all."""
    folder = run.result_folder
    if not folder.is_dir():
        return None
    if run.recipe.method == "full":
        names = ["config.json", *(["model.safetensors"] if not any(folder.glob("*.safetensors")) else [])]
    else:
        names = [ADAPTER_CONFIG, ADAPTER_WEIGHTS]
    return next((folder / name for name in names if not (folder / name).is_file()), None)
