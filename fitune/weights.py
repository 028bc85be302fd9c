"""Fills a sharded skeleton: each rank streams only its own rows from safetensors, quantising on the way if asked.

A checkpoint is either in full precision (bf16, fp16, fp32) or in bitsandbytes' NF4 format: the packed weight as uint8
[n / 2, 1] beside `.absmax`, `.quant_map`, `.nested_absmax`, `.nested_quant_map` and `.quant_state.bitsandbytes__nf4`.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from bitsandbytes.functional import QuantState, get_4bit_type, quantize_4bit, quantize_blockwise
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn

from fitune.checkpoint import Checkpoint
from fitune.errors import FituneError
from fitune.model import decoder
from fitune.nf4 import BLOCK, STORAGE, NF4Linear
from fitune.sharding import local_rows

STATISTICS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
WEIGHTS_PER_ELEMENT = 2 * STORAGE.itemsize


@dataclass(frozen=True)
class Placement:
    """Which rows of every parameter this process keeps, and where it computes."""

    rank: int
    world_size: int
    compute_device: torch.device
    storage_device: torch.device
    "Where the sharded weights live: the CPU when they are offloaded."


def load_weights(
    model: nn.Module, checkpoint: Checkpoint, placement: Placement, seed: int, on_tensor: Callable[[str], None] = id
) -> None:
    """Allocates the sharded `model` (on meta until now) and fills it. `on_tensor` is called after each parameter.

    Every tensor of model and checkpoint is accounted for before memory is taken: FituneError names the tensor and its
    file if one is missing, surplus or of another shape.
    """
    plan = account_for_every_tensor(model, checkpoint)
    model.to_empty(device=placement.storage_device)
    _rebuild_rotary_embedding(model, placement.compute_device)
    loader = _Loader(model, checkpoint, placement, seed)
    with torch.no_grad():
        for name, source in plan.items():
            loader.fill(name, source)
            on_tensor(name)


def account_for_every_tensor(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str | None]:
    """Parameter name -> checkpoint tensor it is filled from (None: part of the adapter)."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    quantised = _quantised_linears(model)
    plan, used = {}, set()
    for name, shape in shapes.items():
        if "lora_" in name or "trainable_tokens_delta" in name:
            plan[name] = None
            continue
        source = _source_name(name, checkpoint)
        if name in quantised:
            shape = (quantised[name].out_features, quantised[name].in_features)
        used |= _check_source(checkpoint, source, shape, is_quantised=name in quantised)
        plan[name] = source
    surplus = [name for name in sorted(checkpoint.tensors) if name not in used]
    surplus = [name for name in surplus if not name.endswith("rotary_emb.inv_freq")]  # a constant old files carry
    if surplus:
        raise FituneError(
            f"{checkpoint[surplus[0]].file}: tensor {surplus[0]} has no place in the model"
            f"{f' (and {len(surplus) - 1} more)' if len(surplus) > 1 else ''}; config.json belongs to another model?"
        )
    return plan


def _quantised_linears(model: nn.Module) -> dict[str, NF4Linear]:
    return {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, NF4Linear)}


def _source_name(parameter: str, checkpoint: Checkpoint) -> str:
    """The checkpoint's name of a parameter: PEFT's prefixes removed, a tied head read from the embedding."""
    name = parameter.removeprefix("base_model.model.").replace(".base_layer", "").replace(".token_adapter", "")
    if name == "lm_head.weight" and name not in checkpoint and "model.embed_tokens.weight" in checkpoint:
        return "model.embed_tokens.weight"
    return name


def is_nf4(checkpoint: Checkpoint, name: str) -> bool:
    return f"{name}.{STATISTICS[-1]}" in checkpoint


def _check_source(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], is_quantised: bool) -> set[str]:
    """The checkpoint tensors that make up one parameter, their shapes checked."""
    info = checkpoint[name]
    if not is_nf4(checkpoint, name):
        if info.shape != shape:
            raise FituneError(f"{info.file}: tensor {name} has shape {info.shape}, the model needs {shape}")
        if not info.dtype.is_floating_point:
            raise FituneError(f"{info.file}: tensor {name} is {info.dtype}; fitune reads bf16, fp16, fp32 and bnb NF4")
        return {name}
    if not is_quantised:
        raise FituneError(f"{info.file}: tensor {name} is NF4; methods full and lora need a bf16 checkpoint, use qlora")
    if info.nbytes * 2 != math.prod(shape):
        raise FituneError(f"{info.file}: tensor {name} packs {info.nbytes * 2} weights, the model needs {shape}")
    parts = {f"{name}.{part}" for part in STATISTICS}
    return {name} | {part for part in parts if part in checkpoint}


def _rebuild_rotary_embedding(model: nn.Module, device: torch.device) -> None:
    """The only buffers: frequencies computed from the config, which `to_empty` left without values."""
    backbone = decoder(model).model
    backbone.rotary_emb = type(backbone.rotary_emb)(config=backbone.config).to(device)


class _Loader:
    """Fills one parameter at a time: never more in memory than one parameter's local rows beside the model."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, placement: Placement, seed: int):
        self.parameters = dict(model.named_parameters())
        self.modules = _quantised_linears(model)
        self.token_ids = {
            f"{name}.trainable_tokens_delta.{adapter}": ids
            for name, module in model.named_modules()
            if isinstance(module, TrainableTokensLayer)
            for adapter, ids in module.token_indices.items()
        }
        self.checkpoint = checkpoint
        self.placement = placement
        self.seed = seed

    def fill(self, name: str, source: str | None) -> None:
        parameter = self.parameters[name]
        local = parameter.to_local()
        start, stop = local_rows(parameter.shape[0], self.placement.rank, self.placement.world_size)
        if local.shape[0] != stop - start:
            raise FituneError(f"{name}: FSDP keeps {local.shape[0]} rows here, expected {stop - start}")
        if source is None:
            local.copy_(self._initial_adapter(name, parameter.shape)[start:stop])
        elif name not in self.modules:
            local.copy_(self.checkpoint.read_rows(source, start, stop))
        elif is_nf4(self.checkpoint, source):
            self._fill_from_nf4(local, self.modules[name], source, start, stop)
        else:
            self._fill_quantising(local, self.modules[name], source, start, stop)

    def _initial_adapter(self, name: str, shape: torch.Size) -> torch.Tensor:
        """LoRA's start (A as in PEFT, B zero), the same on any number of ranks; a trained token starts as it was."""
        if "trainable_tokens_delta" in name:
            source = "model.embed_tokens.weight"
            return torch.cat([self.checkpoint.read_rows(source, i, i + 1) for i in self.token_ids[name]])
        if "lora_B" in name:
            return torch.zeros(shape)
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)

    def _fill_from_nf4(self, local, module: NF4Linear, source: str, start: int, stop: int) -> None:
        size = STORAGE.itemsize
        packed = self.checkpoint.read_bytes(source, start * size, stop * size)
        local.copy_(packed.view(STORAGE).view(-1, 1))
        parts = {f"weight.{part}": f"{source}.{part}" for part in STATISTICS if f"{source}.{part}" in self.checkpoint}
        statistics = {key: self.checkpoint.read(tensor) for key, tensor in parts.items()}
        module.quant_state = QuantState.from_dict(statistics, device=self.placement.compute_device)

    def _fill_quantising(self, local, module: NF4Linear, source: str, start: int, stop: int) -> None:
        """Quantises the local rows, whole blocks at a time, and shares the absmax of all blocks among the ranks.

        The result equals bitsandbytes' `quantize_4bit` of the whole tensor: blocks are independent, and the second
        quantisation sees the same complete absmax vector.
        """
        info, device = self.checkpoint[source], self.placement.compute_device
        first, last = start * WEIGHTS_PER_ELEMENT, stop * WEIGHTS_PER_ELEMENT  # weights of this rank
        block_start, block_stop = first // BLOCK, -(-last // BLOCK)
        absmax = torch.zeros(-(-info.numel // BLOCK), dtype=torch.float32, device=device)
        if stop > start:
            weight_stop = min(block_stop * BLOCK, info.numel)
            size = info.dtype.itemsize
            weights = self.checkpoint.read_bytes(source, block_start * BLOCK * size, weight_stop * size)
            packed, state = quantize_4bit(weights.view(info.dtype).to(device), blocksize=BLOCK, quant_type="nf4")
            offset = first - block_start * BLOCK
            mine = packed.view(-1)[offset // 2 : (offset + last - first) // 2]
            local.copy_(mine.clone().view(STORAGE).view(-1, 1))
            # a block cut by a rank's border is quantised on both sides and counted where it starts
            owned = -(-first // BLOCK)
            absmax[owned:block_stop] = state.absmax[owned - block_start :]
        if self.placement.world_size > 1:
            dist.all_reduce(absmax)
        module.quant_state = _statistics(absmax, info.shape, info.dtype)


def _statistics(absmax: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> QuantState:
    """bitsandbytes' double quantisation of the absmax vector, as in its `quantize_4bit(compress_statistics=True)`."""
    offset = absmax.mean()
    quantised, nested = quantize_blockwise(absmax - offset, blocksize=256)
    return QuantState(
        absmax=quantised,
        shape=torch.Size(shape),
        dtype=dtype,
        blocksize=BLOCK,
        code=get_4bit_type("nf4", device=absmax.device),
        quant_type="nf4",
        offset=offset,
        state2=nested,
    )
