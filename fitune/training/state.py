"""What a training checkpoint holds beside the Trainer's own files: trainable weights and optimizer state, per shard.

    checkpoint-N/state/layout.json                             shards, full shapes, optimizer hyperparameters
    checkpoint-N/state/rank-00000-of-00002/model.safetensors   one shard's rows: NAME, and NAME::exp_avg etc.
    checkpoint-N/adapter/                                   in place of NAME, where an adapter is trained

Nothing is gathered to save it, and because the layout is known it can be read back on another number of ranks. Of
several copies of the model the first is saved: the others are the same.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fitune.config.schema import ADAPTER
from fitune.errors import FituneError
from fitune.export.adapter import AdapterFile, saved_name
from fitune.model.sharding import Share, local_part, local_rows, split_as
from fitune.optimizers.adamw_8bit import AdamW8bit
from fitune.weights.safetensors_files import Checkpoint, CheckpointWriter, TensorSpec

SEPARATOR = "::"


@dataclass(frozen=True)
class TrainingState:
    """What one rank saves: its rows by name, as they lie in memory, and what is the same on all ranks."""

    tensors: dict[str, torch.Tensor]
    layout: dict

    def copied(self) -> "TrainingState":
        """With the same values in host RAM of their own, which no step changes."""
        copies = {name: torch.empty_like(tensor, device="cpu").copy_(tensor) for name, tensor in self.tensors.items()}
        return TrainingState(copies, self.layout)


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer, shards: int, *, weights: bool) -> TrainingState:
    """This rank's rows of the optimizer's state and, with `weights`, of every trainable parameter.

    Nothing is copied but the optimizer's hyperparameters: the next step changes the rows.
    """
    names = {parameter: name for name, parameter in _trainable(model)}
    tensors = {name: local_part(parameter).detach() for parameter, name in names.items()} if weights else {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"{names[parameter]}{SEPARATOR}{key}"] = local_part(torch.as_tensor(value)).detach()
    layout = {
        "world_size": shards,
        "shapes": {name: list(parameter.shape) for parameter, name in names.items()},
        "param_groups": [
            {key: value for key, value in group.items() if key != "params"}
            | {"params": [names[parameter] for parameter in group["params"]]}
            for group in optimizer.param_groups
        ],
    }
    return TrainingState(tensors, layout)


def write_training_state(folder: Path, state: TrainingState, shard: int) -> dict[str, str]:
    """Writes one shard's state; it lets go of each tensor that is written, so that a copy's memory is free again.

    One tensor at a time passes through host RAM. Returns the SHA-256 of what it wrote, by path inside `folder`; the
    disk has it by then.
    """
    part = folder / "state" / f"rank-{shard:05d}-of-{state.layout['world_size']:05d}"
    part.mkdir(parents=True)
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in state.tensors.items()]
    writer = CheckpointWriter(part, specs, one_file="model.safetensors", hashed=True)
    for spec in specs:
        writer.write(spec.name, state.tensors.pop(spec.name))
    writer.close()
    if shard == 0:
        (folder / "state" / "layout.json").write_text(json.dumps(state.layout, indent=1), encoding="utf-8")
    return {str((part / name).relative_to(folder)): sha256 for name, sha256 in writer.hashes.items()}


def load_trainable_weights(folder: Path, model: nn.Module, share: Share) -> None:
    """Fills the trainable parameters of the sharded `model` from a checkpoint, each rank its own rows."""
    with _SavedState(folder) as saved, torch.no_grad():
        for name, parameter in _trainable(model):
            saved.check_shape(name, parameter)
            start, stop = local_rows(parameter.shape[0], share.shard, share.shards)
            local_part(parameter).copy_(saved.weight(name, start, stop))


def load_optimizer_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, share: Share) -> None:
    """Restores the optimizer's state and hyperparameters from a checkpoint, each rank its own rows."""
    parameters = dict(_trainable(model))
    with _SavedState(folder) as saved:
        state, position = {}, 0
        groups = saved.layout["param_groups"]
        for group, own in zip(groups, optimizer.param_groups, strict=True):
            if "foreach" in own:  # takes memory, which `plan` counts as this run has it
                group["foreach"] = own["foreach"]
            for offset, name in enumerate(group["params"]):
                parameter = parameters[name]
                start, stop = local_rows(parameter.shape[0], share.shard, share.shards)
                keys = saved.optimizer_keys(name)
                if isinstance(optimizer, AdamW8bit):  # straight into place: its tensors are many, and no DTensors
                    optimizer.fill_state(parameter, {key: saved.part(name, key, start, stop) for key in keys})
                else:
                    state[position + offset] = {key: saved.like(parameter, name, key, start, stop) for key in keys}
            indices = list(range(position, position + len(group["params"])))
            position += len(indices)
            group["params"] = indices
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _trainable(model: nn.Module):
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


class _SavedState:
    """The shards of the interrupted run, read as whole tensors by row range."""

    def __init__(self, folder: Path):
        self.folder = folder / "state"
        try:
            self.layout = json.loads((self.folder / "layout.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FituneError(f"{folder}: not a checkpoint of fitune: state/layout.json: {error}") from None
        shards = self.layout["world_size"]
        self.parts = [Checkpoint(self.folder / f"rank-{n:05d}-of-{shards:05d}") for n in range(shards)]
        self.adapter = AdapterFile(folder / ADAPTER) if (folder / ADAPTER).is_dir() else None

    def check_shape(self, name: str, parameter: torch.Tensor) -> None:
        saved = self.layout["shapes"].get(name)
        if saved != list(parameter.shape):
            raise FituneError(f"{self.folder}: {name} has shape {saved}, the model needs {list(parameter.shape)}")

    def optimizer_keys(self, name: str) -> list[str]:
        prefix = name + SEPARATOR
        return [key.removeprefix(prefix) for key in self.parts[0].tensors if key.startswith(prefix)]

    def weight(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of parameter `name`."""
        if self.adapter:
            return self.adapter.read_rows(saved_name(name), start, stop)
        return self.rows(name, name, start, stop)

    def rows(self, name: str, key: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of tensor `key`, which is split like parameter `name`."""
        total, found = self.layout["shapes"][name][0], []
        for rank, part in enumerate(self.parts):
            first, last = local_rows(total, rank, len(self.parts))
            low, high = max(start, first), min(stop, last)
            if low < high:
                found.append(part.read_rows(key, low - first, high - first))
        if not found:
            info = self.parts[0][key]
            return torch.empty((0, *info.shape[1:]), dtype=info.dtype)
        return torch.cat(found)

    def part(self, name: str, key: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of optimizer state `key` of a parameter; what has no rows (a step count) is whole."""
        full_key = f"{name}{SEPARATOR}{key}"
        return self.rows(name, full_key, start, stop) if self.parts[0][full_key].shape else self.parts[0].read(full_key)

    def like(self, parameter: torch.Tensor, name: str, key: str, start: int, stop: int) -> torch.Tensor:
        """Optimizer state `key` in the parameter's layout; what is not split by rows (a step count) is whole."""
        info = self.parts[0][f"{name}{SEPARATOR}{key}"]
        if info.shape and info.shape[1:] != tuple(self.layout["shapes"][name][1:]):
            raise FituneError(f"{self.folder}: optimizer state {key} is not split like its weight; cannot be resumed")
        rows = self.part(name, key, start, stop)
        if not info.shape:
            return rows
        return split_as(parameter, rows.to(local_part(parameter).device))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for part in self.parts:
            part.close()
        if self.adapter:
            self.adapter.close()
