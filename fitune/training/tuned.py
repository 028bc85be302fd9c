"""Loads a finished run's result back into its sharded model."""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fitune.config.schema import Run
from fitune.errors import UsageError
from fitune.export.adapter import AdapterFile, saved_name
from fitune.model.sharding import local_part, local_rows, share_of
from fitune.training.distributed import is_main_process
from fitune.training.held_adapter import hold
from fitune.weights.base_identity import base_fingerprint, base_mismatch, read_base_record, settle_doubt
from fitune.weights.safetensors_files import Checkpoint


def tuned_base_folder(run: Run, base_folder: Path, force: bool = False) -> Path:
    """The checkpoint under the tuned model: the base for an adapter, the result itself for method full.

    Raises UsageError for an unfinished run, and unless `force` for a base that its adapter was not trained on.
    """
    result = run.result_folder
    if not result.is_dir():
        raise UsageError(f"{result}: no such folder; the run has not finished: `train {run.recipe_name} ... --resume`")
    if run.recipe.method == "full":
        return result
    refuse_another_base(result, base_folder, force)
    return base_folder


def refuse_another_base(adapter: Path, base_folder: Path, force: bool) -> None:
    """UsageError for a base that is not the adapter's own, as far as its record tells, unless `force`."""
    record, doubt = read_base_record(adapter), None
    if record is not None:
        with Checkpoint(base_folder) as checkpoint:
            doubt = base_mismatch(record, base_fingerprint(checkpoint))
    said = settle_doubt(base_folder, adapter, doubt, recorded=record is not None, force=force)
    if said and is_main_process():
        print(said, file=sys.stderr)


def load_tuned_weights(run: Run, model: nn.Module, mesh: DeviceMesh) -> None:
    """Fills the adapter of the sharded `model` from the run's result, each rank its own rows; method full has none.

    The result may be an adapter from elsewhere, if `model` was made with the shape that `hold` gives it.
    """
    if run.recipe.method == "full":
        return
    share = share_of(run, mesh.get_rank())
    with AdapterFile(run.result_folder) as adapter, torch.no_grad():
        held = hold(adapter)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                rows, columns = parameter.shape
                mine = local_rows(rows, share.shard, share.shards)
                local_part(parameter).copy_(held.rows(adapter, saved_name(name), columns, *mine))
