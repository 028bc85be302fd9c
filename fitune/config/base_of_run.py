"""The base of a run that was trained before: where it was moved, the error says how the run is told."""

from collections.abc import Callable
from pathlib import Path

from fitune.config.hub import local_folder
from fitune.config.schema import Run
from fitune.errors import UsageError


def base_of_run(run: Run, find: Callable[[str, str | None], Path] = local_folder) -> Path:
    """Its folder, by `local_folder`, or by `local_config` without the weights.

    Raises UsageError as these do, and for one that is nowhere with the key of run.yaml that names it.
    """
    base, settings = run.recipe.base, run.folder / "run.yaml"
    try:
        return find(base.model, base.revision)
    except UsageError as error:
        if Path(base.model).expanduser().exists() or not settings.is_file():
            raise
        moved = f"if the base was moved, write its new place at recipe.base.model in {settings}"
        raise UsageError(f"{error}; {moved}") from None
