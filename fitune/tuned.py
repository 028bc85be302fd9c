"""Loads a finished run's result back into its sharded model."""

from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fitune.adapter import AdapterFile, saved_name
from fitune.base_identity import base_fingerprint, base_mismatch, read_base_record
from fitune.checkpoint import Checkpoint
from fitune.config import Run
from fitune.errors import UsageError
from fitune.sharding import local_rows


def tuned_base_folder(run: Run, base_folder: Path) -> Path:
    """The checkpoint under the tuned model: the base for an adapter, the result itself for method full.

    Raises UsageError for an unfinished run, and for a base other than the one its adapter was trained on.
    """
    result = run.result_folder
    if not result.is_dir():
        raise UsageError(f"{result}: no such folder; the run has not finished: `train {run.recipe_name} ... --resume`")
    if run.recipe.method == "full":
        return result
    _refuse_another_base(result, base_folder)
    return base_folder


def _refuse_another_base(adapter: Path, base_folder: Path) -> None:
    record = read_base_record(adapter)
    if record is None:
        return
    with Checkpoint(base_folder) as checkpoint:
        difference = base_mismatch(record, base_fingerprint(checkpoint))
    if difference:
        raise UsageError(f"{base_folder}: {difference}; the adapter in {adapter} works on that base only")


def load_tuned_weights(run: Run, model: nn.Module, mesh: DeviceMesh) -> None:
    """Fills the adapter of the sharded `model` from the run's result, each rank its own rows; method full has none."""
    if run.recipe.method == "full":
        return
    with AdapterFile(run.result_folder) as adapter, torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                start, stop = local_rows(parameter.shape[0], mesh.get_rank(), mesh.size())
                parameter.to_local().copy_(adapter.read_rows(saved_name(name), start, stop))
