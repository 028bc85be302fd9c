"""Weights rounded to fp8 on the way in equal the whole tensor's rounding, and each rank reads only its rows."""

import pytest
import torch
from ranks import run_ranks, sharded_model
from safetensors.torch import load_file, save_file

from fitune.model import fp8
from fitune.model.fp8_linear import FP8Linear
from fitune.model.sharding import local_part
from fitune.weights import load as weights
from fitune.weights.safetensors_files import Checkpoint

SMALL_CHUNK = 1000
"Bytes: one to seven rows, and the last chunk of a rank is a short one."


def _load(run, chunk_bytes: int) -> dict:
    """What this rank holds of each frozen linear, and the bytes that it read."""
    read, close = [], Checkpoint.close

    def record(self):
        read.append(self.bytes_read)
        close(self)

    Checkpoint.close, weights.CHUNK_BYTES = record, chunk_bytes
    model, _ = sharded_model(run)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, FP8Linear)}
    names = {name: name.removeprefix("base_model.model.").replace(".base_layer", "") for name in modules}
    return {
        "rows": {f"{names[n]}.weight": _bytes(local_part(m.weight)) for n, m in modules.items()},
        "scales": {f"{names[n]}.weight": m.scales for n, m in modules.items()},
        "held": sum(local_part(m.weight).untyped_storage().nbytes() for m in modules.values()),
        "read": sum(read),
    }


def _bytes(values: torch.Tensor) -> torch.Tensor:
    return values.detach().view(torch.uint8).clone()


def _stored_in(base, folder, dtype: torch.dtype):
    """A copy of `base` whose tensors are in `dtype`, with digits that bf16 would not have."""
    folder.mkdir()
    for file in base.iterdir():
        if file.suffix == ".safetensors":
            tensors = {name: (tensor.float() * 1.003).to(dtype) for name, tensor in load_file(file).items()}
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
        else:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("offload", [False, True], ids=["", "in host RAM"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rows_on_any_ranks_are_those_of_the_whole_tensor(stored, offload, uneven_base, make_run, tmp_path):
    """V and s are what bf16 weights become just before a product, whatever they are stored in."""
    base = _stored_in(uneven_base, tmp_path / "base", stored)
    with Checkpoint(base) as checkpoint:
        tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
        nbytes = checkpoint.nbytes
    for world_size, chunk_bytes in ((1, SMALL_CHUNK), (3, SMALL_CHUNK), (2, weights.CHUNK_BYTES)):
        options = {"mixed_precision": "bf16", "offload_params": offload, "compute": "fp8"}
        run = make_run(base, tmp_path, "lora", processes=world_size, **options)
        ranks = run_ranks(_load, world_size, run, chunk_bytes)
        linears = [name for name in tensors if "_proj" in name]
        for name in linears:
            values, scales = fp8.round_weight(tensors[name].to(torch.bfloat16))
            assert torch.equal(torch.cat([found["rows"][name] for found in ranks]), _bytes(values)), name
            assert all(torch.equal(found["scales"][name], scales) for found in ranks), name
        assert all(set(found["rows"]) == set(found["scales"]) == set(linears) for found in ranks)
        assert sum(found["read"] for found in ranks) == nbytes
        matrices = sum(tensors[name].numel() for name in linears)
        assert matrices <= sum(found["held"] for found in ranks) < 1.05 * matrices  # a byte each; ranks' last rows
