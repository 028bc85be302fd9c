"""What a rank has loaded, in a form that compares: packed bytes and statistics by the checkpoint's names."""

import shutil

import torch
from bitsandbytes.functional import QuantState
from ranks import sharded_model, whole
from safetensors.torch import load_file, save_file

from fitune.model.nf4 import NF4Linear
from fitune.weights.safetensors_files import Checkpoint

CPU = torch.device("cpu")


def state_content(state: QuantState) -> dict:
    """All that a QuantState holds, as tensors and plain values that compare with `same`."""
    found = {"absmax": state.absmax, "code": state.code, "blocksize": state.blocksize, "type": state.quant_type}
    found |= {"shape": tuple(state.shape), "dtype": state.dtype, "nested": state.nested}
    if state.nested:
        nested = {"absmax": state.state2.absmax, "code": state.state2.code, "blocksize": state.state2.blocksize}
        found |= {f"nested {key}": value for key, value in nested.items()} | {"offset": state.offset}
    return found


def same(found, expected) -> bool:
    if isinstance(expected, dict):
        return set(found) == set(expected) and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    return found == expected


def _packed(weight: torch.Tensor) -> torch.Tensor:
    return whole(weight).detach().view(torch.uint8).view(-1).clone()


def quantised(model) -> dict:
    """Packed bytes and statistics of every NF4 linear, by the checkpoint's name."""
    names = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    return {
        f"{name.removeprefix('base_model.model.').replace('.base_layer', '')}.weight": {"bytes": _packed(module.weight)}
        | state_content(module.quant_state)
        for name, module in names.items()
    }


def load_and_count_bytes(run) -> tuple[torch.nn.Module, int]:
    """Loads `run`; also returns the bytes this rank read from the base."""
    counted = []
    close = Checkpoint.close

    def record(self):
        counted.append(self.bytes_read)
        close(self)

    Checkpoint.close = record
    try:
        model, _ = sharded_model(run)
    finally:
        Checkpoint.close = close
    return model, sum(counted)


def damaged_copy(base, folder, change):
    """A copy of `base` as one file whose tensors `change` has altered."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tensors = {}
    for file in sorted(base.glob("*.safetensors")):
        tensors |= load_file(file)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
