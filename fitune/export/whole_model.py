"""The whole model that a run, a PEFT adapter or a model's folder stands for, merged first where it must be."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fitune.config.adapter_folder import is_adapter, named_base
from fitune.config.base_of_run import base_of_run
from fitune.config.gguf_files import refuse_gguf
from fitune.config.hub import local_folder
from fitune.config.schema import Run
from fitune.errors import UsageError
from fitune.export.merge import GIVE_BASE, merge_folder, merge_run


@dataclass(frozen=True)
class WholeModel:
    """`weights` is a folder whose tensors have the model's sizes; `make(folder)` returns the model's own folder.

    That is the one `given` where it is whole already, else `folder`, which it writes as `merge` does, of `weights` and
    `adapter`. `run` is whose result it is, if that is known; `check` says whether what is made of it is checked too.
    """

    given: Path
    weights: Path
    make: Callable[[Path], Path]
    adapter: Path | None = None
    run: Run | None = None
    check: bool = True

    @property
    def needs_merging(self) -> bool:
        return self.adapter is not None


def whole_model(
    given: Path, run: Run | None, *, base: str | None = None, onto=None, force: bool = False, check: bool = True
) -> WholeModel:
    """Of the folder `given`, which is `run`'s or its checkpoint's if there is one. UsageError for anything else."""
    options = {"base": base, "onto": onto, "force": force, "check": check}
    if run is None and not is_adapter(given):
        if not (given / "config.json").is_file():
            refuse_gguf(given, "run, adapter or model's folder")
            raise UsageError(f"{given}: neither a run, an adapter nor a model's folder")
        return _as_it_is(given, given, base, onto, check=check)
    if run is not None and run.recipe.method == "full":
        return _as_it_is(run.result_folder, given, base, onto, run=run, check=check)
    if run is not None:
        weights = local_folder(base) if base else base_of_run(run)
        return WholeModel(
            given, weights, lambda folder: merge_run(run, folder, **options), run.result_folder, run, check
        )
    weights = local_folder(*((base, None) if base else named_base(given, GIVE_BASE)))
    return WholeModel(given, weights, lambda folder: merge_folder(given, folder, **options), given, check=check)


def _as_it_is(model: Path, given: Path, base: str | None, onto, **of_check) -> WholeModel:
    if base or onto:
        raise UsageError(f"{given}: a whole model, nothing to merge: leave out {'--base' if base else '--onto'}")
    return WholeModel(given, model, lambda folder: model, **of_check)
