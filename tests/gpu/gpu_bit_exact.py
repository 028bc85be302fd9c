"""One rank of the bit-exactness check: `torchrun --nproc-per-node N tests/gpu/gpu_bit_exact.py RUN.yaml`.

Compares every byte of every gathered NF4 weight, and its statistics, with the checkpoint's, before and after ten
optimizer steps. A checkpoint in bf16 is quantised for that by bitsandbytes itself, tensor by tensor. Where a run keeps
its base in fp8, values and scales are compared with those of the whole weights.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from bitsandbytes.functional import QuantState, quantize_4bit
from torch.distributed.fsdp import FSDPModule

from fitune.config import run as runs
from fitune.data.dataset import load_tokenizer
from fitune.model.fp8 import round_weight
from fitune.model.fp8_linear import FP8Linear
from fitune.model.nf4 import NF4Linear
from fitune.model.skeleton import decoder
from fitune.training.distributed import close_process_group, compute_device, join
from fitune.training.train import load_sharded_model
from fitune.weights.accounting import STATISTICS, is_nf4
from fitune.weights.safetensors_files import Checkpoint


def changed_bytes(model, checkpoint: Checkpoint, device: torch.device) -> tuple[int, int]:
    """(bytes that differ, bytes compared) over all quantised weights, as this rank gathers them."""
    changed = compared = 0
    for index, layer in enumerate(decoder(model).model.layers):
        sharded = isinstance(layer, FSDPModule)  # one rank with its weights on the GPU needs no FSDP
        if sharded:
            layer.unshard()
        for name, module in layer.named_modules():
            stored = f"model.layers.{index}.{name.removesuffix('.base_layer')}.weight"
            if isinstance(module, NF4Linear):
                found = parts(module.weight.detach(), module.quant_state)
                expected = expected_parts(checkpoint, stored, device)
            elif isinstance(module, FP8Linear):
                found = as_bytes([module.weight.detach(), module.scales])
                expected = as_bytes(round_weight(checkpoint.read(stored).to(device, torch.bfloat16)))
            else:
                continue
            for part, wanted in zip(found, expected, strict=True):
                changed += int((part != wanted).sum())
                compared += wanted.numel()
        if sharded:
            layer.reshard()
    return changed, compared


def expected_parts(checkpoint: Checkpoint, name: str, device: torch.device) -> list[torch.Tensor]:
    stored = checkpoint.read(name)
    if not is_nf4(checkpoint, name):
        return parts(*quantize_4bit(stored.to(device), compress_statistics=True, quant_type="nf4"))
    statistics = {f"weight.{part}": checkpoint.read(f"{name}.{part}") for part in STATISTICS}
    return parts(stored, QuantState.from_dict(statistics, device=device))


def parts(weight: torch.Tensor, state: QuantState) -> list[torch.Tensor]:
    """A double-quantised weight's tensors as bytes."""
    return as_bytes([weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code])


def as_bytes(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.cpu().contiguous().view(-1).view(torch.uint8) for tensor in tensors]


def main() -> None:
    run = runs.load(Path(sys.argv[1]))
    mesh = join(run)
    folder = Path(run.recipe.base.model)
    fp8 = run.profile.compute == "fp8"
    model = load_sharded_model(run, folder, load_tokenizer(run.recipe, folder), mesh, fp8=fp8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    with Checkpoint(folder) as checkpoint:
        model(input_ids=torch.ones(1, 8, dtype=torch.long, device=compute_device(mesh)))  # FSDP starts lazily
        before = changed_bytes(model, checkpoint, compute_device(mesh))
        torch.manual_seed(mesh.get_rank())
        tokens = torch.randint(0, 1000, (1, 256), device=compute_device(mesh))
        for _ in range(10):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        after = changed_bytes(model, checkpoint, compute_device(mesh))
    print(
        f"rank {mesh.get_rank()}/{mesh.size()}, offload {run.accelerate.offload_params}: changed bytes before "
        f"{before[0]} after {after[0]} of {after[1]}; loss {losses[0]:.3f} -> {losses[-1]:.3f}",
        flush=True,
    )
    total = torch.tensor([before[0] + after[0]])
    dist.all_reduce(total)
    close_process_group()
    sys.exit(int(not after[1] or total.item() > 0 or not losses[-1] < losses[0]))


if __name__ == "__main__":
    main()
