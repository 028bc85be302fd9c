"""Loads a finished run's result back into its sharded model."""

import math
import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fitune.config.command_name import command
from fitune.config.schema import Run
from fitune.errors import UsageError
from fitune.export.adapter import AdapterFile, saved_name
from fitune.model.sharding import Share, local_part, local_rows, share_of
from fitune.training.distributed import is_main_process, wait_for_all
from fitune.training.held_adapter import HeldAdapter, hold
from fitune.training.state import load_trainable_weights
from fitune.weights.base_identity import base_fingerprint, base_mismatch, read_base_record, settle_doubt
from fitune.weights.safetensors_files import Checkpoint


def tuned_base_folder(run: Run, base_folder: Path, force: bool = False) -> Path:
    """The checkpoint under the tuned model: the base for an adapter, the result itself for method full.

    Of a full run's checkpoint it is the base too, whose place `load_tuned_weights` fills. Raises UsageError for an
    unfinished run, and unless `force` for a base that its adapter was not trained on.
    """
    if run.recipe.method == "full" and run.checkpoint:
        return base_folder
    result = run.result_folder
    if not result.is_dir():
        go_on = command("train", "--resume", run.folder)
        raise UsageError(f"{result}: no such folder; the run has not finished: {go_on}")
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
    """Fills the adapter of the sharded `model` from the run's result, each rank its own rows.

    Method full has none: what `tuned_base_folder` holds is all there is, but for a checkpoint, whose weights are those
    of training, before they are rounded for a result.

    The result may be an adapter from elsewhere, if `model` was made with the shape that `hold` gives it. Raises
    UsageError for one that is not as the run's settings say. Call on all ranks: returns when all have read theirs.
    """
    share = share_of(run, mesh.get_rank())
    if run.recipe.method != "full":
        _load_adapter(run, model, share)
    elif run.checkpoint:
        load_trainable_weights(Path(run.checkpoint), model, share)
    wait_for_all()


def _load_adapter(run: Run, model: nn.Module, share: Share) -> None:
    with AdapterFile(run.result_folder) as adapter, torch.no_grad():
        held = hold(adapter)
        parameters = {saved_name(name): part for name, part in model.named_parameters() if part.requires_grad}
        _refuse_other_settings(run, held, set(parameters))
        for name, parameter in parameters.items():
            rows, columns = parameter.shape
            mine = local_rows(rows, share.shard, share.shards)
            local_part(parameter).copy_(held.rows(adapter, name, columns, *mine))


def _refuse_other_settings(run: Run, held: HeldAdapter, names: set[str]) -> None:
    """UsageError for a run.yaml that was changed after training: its adapter would answer as it never did."""
    lora = run.recipe.lora
    stored, wanted = (held.rank, held.scale * held.rank), (lora.r, lora.alpha)
    if held.rank != lora.r or not math.isclose(stored[1], wanted[1], rel_tol=1e-6):
        there, here = (f"lora.r {r} and lora.alpha {alpha:g}" for r, alpha in (stored, wanted))
    elif set(held.sources) != names:
        there, here = (f"{len(tensors)} tensors" for tensors in (held.sources, names))
    else:
        return
    raise UsageError(
        f"{run.result_folder}: has {there}, {run.folder / 'run.yaml'} asks for {here}: put its lora block back as it "
        f"was, or give the adapter's folder"
    )
