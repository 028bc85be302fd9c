"""What runs leave, given where a run itself is wanted."""

from pathlib import Path

from fitune.config.adapter_folder import is_adapter
from fitune.config.command_name import command
from fitune.config.gguf_files import SUFFIX, refuse_gguf
from fitune.errors import UsageError


def refuse_what_runs_leave(given: Path) -> None:
    """UsageError for a GGUF, an adapter's folder or a model's, which says what they are for."""
    if given.suffix != SUFFIX and (given.is_file() or (given / "run.yaml").exists()):
        return
    refuse_gguf(given, "run")
    whose = "an adapter's" if is_adapter(given) else "a model's" if (given / "config.json").is_file() else None
    if whose:
        raise UsageError(f"{given}: {whose} folder, no run's; expected a run folder written by `{command()} train`")
