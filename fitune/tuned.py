"""Loads a finished run's result back into its sharded model."""

from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fitune.checkpoint import Checkpoint, read_header
from fitune.config import Run
from fitune.errors import UsageError
from fitune.sharding import local_rows

ADAPTER_FILE = "adapter_model.safetensors"


def tuned_base_folder(run: Run, base_folder: Path) -> Path:
    """The checkpoint under the tuned model: the base for an adapter, the result itself for method full."""
    result = run.result_folder
    if not result.is_dir():
        raise UsageError(f"{result}: no such folder; the run has not finished: `train {run.recipe_name} ... --resume`")
    return result if run.recipe.method == "full" else base_folder


def load_tuned_weights(run: Run, model: nn.Module, mesh: DeviceMesh) -> None:
    """Fills the adapter of the sharded `model` from the run's result, each rank its own rows; nothing for method full."""
    if run.recipe.method == "full":
        return
    with AdapterCheckpoint(run.result_folder) as adapter, torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                start, stop = local_rows(parameter.shape[0], mesh.get_rank(), mesh.size())
                parameter.to_local().copy_(adapter.read_rows(name.replace(".default", ""), start, stop))


class AdapterCheckpoint(Checkpoint):
    """A PEFT adapter's folder as a table of tensors."""

    def _files(self):
        return {self.folder / ADAPTER_FILE: list(read_header(self.folder / ADAPTER_FILE)[0])}
