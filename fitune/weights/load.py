"""Fills a sharded skeleton: each rank streams only its own rows from safetensors, to NF4 or fp8 on the way if asked.

A checkpoint is either in full precision (bf16, fp16, fp32) or in bitsandbytes' NF4 format, as
`fitune.weights.accounting` has it.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from bitsandbytes.functional import QuantState, get_4bit_type, quantize_4bit, quantize_blockwise
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn

from fitune.config.read_buffers import CHUNK_BYTES
from fitune.config.stored_weights import EMBEDDING, HEAD
from fitune.errors import FituneError
from fitune.model.fp8 import round_weight
from fitune.model.fp8_linear import FP8Linear
from fitune.model.host_ram import PIN_FROM_BYTES, pin_in_place
from fitune.model.nf4 import BLOCK, NESTED_BLOCK, STORAGE, NF4Linear
from fitune.model.sharding import fsdp_parameters, local_part, local_rows, pad
from fitune.model.skeleton import decoder, is_tied
from fitune.weights.accounting import STATISTICS, account_for_every_tensor, is_nf4, quantised_linears, stored_bytes
from fitune.weights.safetensors_files import Checkpoint
from fitune.weights.streaming import Read, Step, stream

WEIGHTS_PER_ELEMENT = 2 * STORAGE.itemsize


@dataclass(frozen=True)
class Placement:
    """Which rows of every parameter this process keeps, and where it computes."""

    shard: int
    shards: int
    device: torch.device
    "Where layers are computed, and where their weights live unless they are offloaded."
    in_host_ram: frozenset[nn.Module] = frozenset()
    "Modules whose own parameters stay on the CPU."
    group: dist.ProcessGroup | None = None
    "The processes that hold the other shards; None: all."


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    placement: Placement,
    seed: int,
    on_tensor: Callable[[int], None] = lambda _: None,
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """Allocates the sharded `model` (on meta until now) and fills it, module by module.

    `on_tensor` is called after each parameter with the bytes that it has in the checkpoint, all ranks' rows together, a
    tensor that fills two counted once; `on_step` after each step of at most 64 MiB.

    Every tensor of model and checkpoint is accounted for before memory is taken: FituneError names the tensor and its
    file if one is missing, surplus or of another shape.
    """
    plan = account_for_every_tensor(model, checkpoint)
    causal_lm, tied = decoder(model), is_tied(decoder(model))
    loader = _Loader(model, checkpoint, placement, seed)
    kept_by_fsdp, told = fsdp_parameters(model), set()

    def steps() -> Iterator[Step]:
        # a unit comes before its modules: FSDP looks after all its parameters when it is allocated, some still on meta
        for prefix, module in model.named_modules():
            if tied and module is causal_lm.lm_head:  # the embedding, which came before it
                module.weight = causal_lm.model.embed_tokens.weight
                continue
            module.to_empty(device="cpu" if module in placement.in_host_ram else placement.device, recurse=False)
            for name, parameter in module.named_parameters(prefix, recurse=False):
                place = module, name.rpartition(".")[2]
                if place in kept_by_fsdp and local_part(parameter).nbytes >= PIN_FROM_BYTES:
                    pad(parameter, kept_by_fsdp[place])
                yield from loader.fill(name, parameter, plan[name])
                yield partial(on_tensor, 0 if plan[name] in told else stored_bytes(checkpoint, plan[name]))
                told.add(plan[name])

    with torch.no_grad():
        stream(checkpoint, steps(), placement.device.type == "cuda", on_step)
    _rebuild_rotary_embedding(model, placement.device)


def _rebuild_rotary_embedding(model: nn.Module, device: torch.device) -> None:
    """The only buffers: frequencies computed from the config, which `to_empty` left without values."""
    backbone = decoder(model).model
    backbone.rotary_emb = type(backbone.rotary_emb)(config=backbone.config).to(device)


class _Loader:
    """Turns parameters into reads of this rank's byte ranges, and what to do with the bytes."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, placement: Placement, seed: int):
        self.modules = quantised_linears(model)
        self.in_fp8 = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, FP8Linear)}
        self.token_ids = {
            f"{name}.trainable_tokens_delta.{adapter}": ids
            for name, module in model.named_modules()
            if isinstance(module, TrainableTokensLayer)
            for adapter, ids in module.token_indices.items()
        }
        self.checkpoint = checkpoint
        self.placement = placement
        self.seed = seed

    def fill(self, name: str, parameter: torch.Tensor, source: str | None) -> Iterator[Step]:
        """The steps that fill one parameter, and page-lock it if it stays in host RAM."""
        local = local_part(parameter)
        start, stop = local_rows(parameter.shape[0], self.placement.shard, self.placement.shards)
        if local.shape[0] != stop - start:
            raise FituneError(f"{name}: FSDP keeps {local.shape[0]} rows here, expected {stop - start}")
        if source is None:
            local.copy_(self._initial_adapter(name, parameter.shape)[start:stop])
        elif name in self.in_fp8:
            yield from self._rounding(self.in_fp8[name], source, start, stop, local)
        elif name not in self.modules:
            info = self.checkpoint[source]
            row_bytes = info.nbytes // info.shape[0]
            yield from self._copies(source, start * row_bytes, stop * row_bytes, info.dtype, local)
        elif is_nf4(self.checkpoint, source):
            yield from self._stored_statistics(self.modules[name], source)
            yield from self._copies(source, start * STORAGE.itemsize, stop * STORAGE.itemsize, STORAGE, local)
        else:
            yield from self._quantising(self.modules[name], source, start, stop, local)
        if self.placement.device.type == "cuda":
            yield lambda: pin_in_place(local)

    def _initial_adapter(self, name: str, shape: torch.Size) -> torch.Tensor:
        """LoRA's start (A as in PEFT, B zero), the same on any number of ranks; a trained token starts as it was."""
        if "trainable_tokens_delta" in name:
            source = HEAD if "lm_head" in name else EMBEDDING
            return torch.cat([self.checkpoint.read_rows(source, i, i + 1) for i in self.token_ids[name]])
        if "lora_B" in name:
            return torch.zeros(1).expand(shape)  # one number in memory
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)

    def _copies(self, source: str, start: int, stop: int, dtype: torch.dtype, local: torch.Tensor) -> Iterator[Step]:
        """Bytes [start, stop) of a tensor into `local`, as they are or cast from `dtype`."""
        flat = local.view(-1)
        straight = local.device.type == "cpu" and local.dtype == dtype
        for low in range(start, stop, CHUNK_BYTES):
            high = min(low + CHUNK_BYTES, stop)
            part = flat[(low - start) // dtype.itemsize : (high - start) // dtype.itemsize]
            if straight:
                yield Read(source, low, high, destination=part.view(torch.uint8))
            else:
                yield Read(source, low, high, consume=lambda data, part=part: part.copy_(data.view(dtype)))

    def _stored_statistics(self, module: NF4Linear, source: str) -> Iterator[Step]:
        """Small, but read ahead as weights are: on a busy disk each would be waited for."""
        statistics = {}
        for part in STATISTICS:
            if (name := f"{source}.{part}") in self.checkpoint:
                info = self.checkpoint[name]
                data = torch.empty(info.nbytes, dtype=torch.uint8)
                statistics[f"weight.{part}"] = data.view(info.dtype).reshape(info.shape)
                yield Read(name, 0, info.nbytes, destination=data)

        def keep() -> None:
            module.quant_state = QuantState.from_dict(statistics, device=self.placement.device)

        yield keep

    def _quantising(self, module: NF4Linear, source: str, start: int, stop: int, local: torch.Tensor) -> Iterator[Step]:
        """Quantises the local rows, whole blocks at a time, and shares the absmax of all blocks among the ranks.

        The result equals bitsandbytes' `quantize_4bit` of the whole tensor: blocks are independent, and the second
        quantisation sees the same complete absmax vector.
        """
        info, device = self.checkpoint[source], self.placement.device
        size = info.dtype.itemsize
        first, last = start * WEIGHTS_PER_ELEMENT, stop * WEIGHTS_PER_ELEMENT  # weights of this rank
        absmax = torch.zeros(-(-info.numel // BLOCK), dtype=torch.float32, device=device)
        flat = local.view(-1).view(torch.uint8)

        def quantise(data: torch.Tensor, begin: int) -> None:
            """Weights from number `begin` on, which starts a block, in the stored dtype."""
            packed, state = quantize_4bit(data.view(info.dtype).to(device), blocksize=BLOCK, quant_type="nf4")
            low, high = max(begin, first), min(begin + data.numel() // size, last)
            flat[(low - first) // 2 : (high - first) // 2] = packed.view(-1)[(low - begin) // 2 : (high - begin) // 2]
            # a block cut by a rank's border is quantised on both sides and counted where it starts
            owned, block = -(-low // BLOCK), begin // BLOCK
            absmax[owned : block + state.absmax.numel()] = state.absmax[owned - block :]

        step = CHUNK_BYTES // size
        whole_blocks_end = min(-(-last // BLOCK) * BLOCK, info.numel) if last > first else 0
        for begin in range(first // BLOCK * BLOCK, whole_blocks_end, step):
            end = min(begin + step, whole_blocks_end)
            yield Read(source, begin * size, end * size, consume=lambda data, begin=begin: quantise(data, begin))

        def share() -> None:
            if self.placement.shards > 1:
                dist.all_reduce(absmax, group=self.placement.group)
            module.quant_state = double_quantised(absmax, info.shape, info.dtype)

        yield share

    def _rounding(self, module: FP8Linear, source: str, start: int, stop: int, local: torch.Tensor) -> Iterator[Step]:
        """Rounds rows [start, stop), some at a time, and shares the scales of all rows among the ranks."""
        info, device = self.checkpoint[source], self.placement.device
        scales = torch.zeros(info.shape[0], dtype=torch.float32, device=device)

        def round_rows(data: torch.Tensor, low: int, high: int) -> None:
            rows = data.view(info.dtype).view(high - low, -1).to(device).to(module.computed_in)
            values, scales[low:high] = round_weight(rows)
            local[low - start : high - start] = values

        row_bytes = info.nbytes // info.shape[0]
        step = max(1, CHUNK_BYTES // row_bytes)
        for low in range(start, stop, step):
            high = min(low + step, stop)
            consume = partial(round_rows, low=low, high=high)
            yield Read(source, low * row_bytes, high * row_bytes, consume=consume)

        def share() -> None:
            if self.placement.shards > 1:
                dist.all_reduce(scales, group=self.placement.group)
            module.scales = scales

        yield share


def double_quantised(absmax: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> QuantState:
    """bitsandbytes' double quantisation of the absmax vector, as in its `quantize_4bit(compress_statistics=True)`."""
    offset = absmax.mean()
    quantised, nested = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
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
