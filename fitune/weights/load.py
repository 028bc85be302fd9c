"""Fills a sharded skeleton: each rank streams only its own rows from safetensors, quantising on the way if asked.

A checkpoint is either in full precision (bf16, fp16, fp32) or in bitsandbytes' NF4 format: the packed weight as uint8
[n / 2, 1] beside `.absmax`, `.quant_map`, `.nested_absmax`, `.nested_quant_map` and `.quant_state.bitsandbytes__nf4`.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from bitsandbytes.functional import QuantState, get_4bit_type, quantize_4bit, quantize_blockwise
from bitsandbytes.utils import unpack_tensor_to_dict
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn

from fitune.config.read_buffers import CHUNK_BYTES
from fitune.config.stored_weights import EMBEDDING, HEAD
from fitune.errors import FituneError
from fitune.model.nf4 import BLOCK, NESTED_BLOCK, STORAGE, NF4Linear
from fitune.model.sharding import fsdp_parameters, local_part, local_rows, pad
from fitune.model.skeleton import decoder, is_tied
from fitune.weights.safetensors_files import Checkpoint
from fitune.weights.streaming import PIN_FROM_BYTES, Read, Step, pin_in_place, stream

QUANT_STATE = "quant_state.bitsandbytes__nf4"
STATISTICS = (QUANT_STATE, "absmax", "quant_map", "nested_absmax", "nested_quant_map")
"Parts of a packed weight; the nested ones only where the absmax vector is itself quantised."
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
    on_tensor: Callable[[int], None] = id,
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """Allocates the sharded `model` (on meta until now) and fills it, module by module.

    `on_tensor` is called after each parameter with the bytes that it has in the checkpoint, all ranks' rows together,
    `on_step` after each step of at most 64 MiB.

    Every tensor of model and checkpoint is accounted for before memory is taken: FituneError names the tensor and its
    file if one is missing, surplus or of another shape.
    """
    plan = account_for_every_tensor(model, checkpoint)
    causal_lm, tied = decoder(model), is_tied(decoder(model))
    loader = _Loader(model, checkpoint, placement, seed)
    kept_by_fsdp = fsdp_parameters(model)

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
                yield partial(on_tensor, stored_bytes(checkpoint, plan[name]))

    with torch.no_grad():
        stream(checkpoint, steps(), placement.device.type == "cuda", on_step)
    _rebuild_rotary_embedding(model, placement.device)


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
    if is_tied(decoder(model)) and HEAD in checkpoint:
        _refuse_another_head(checkpoint)
        used.add(HEAD)
    surplus = [name for name in sorted(checkpoint.tensors) if name not in used]
    surplus = [name for name in surplus if not name.endswith("rotary_emb.inv_freq")]  # a constant old files carry
    if surplus:
        raise FituneError(
            f"{checkpoint[surplus[0]].file}: tensor {surplus[0]} has no place in the model"
            f"{f' (and {len(surplus) - 1} more)' if len(surplus) > 1 else ''}; config.json belongs to another model?"
        )
    return plan


def stored_bytes(checkpoint: Checkpoint, source: str | None) -> int:
    """Of a parameter and, where it is packed, its statistics; 0 for the adapter's."""
    names = [source, *(f"{source}.{part}" for part in STATISTICS)] if source else []
    return sum(checkpoint[name].nbytes for name in names if name in checkpoint)


def _refuse_another_head(checkpoint: Checkpoint) -> None:
    """FituneError where the head that a checkpoint stores beside the embedding is not the same, as its config says."""
    head, embedding = checkpoint[HEAD], checkpoint[EMBEDDING]
    rows = max(1, CHUNK_BYTES * head.shape[0] // max(1, head.nbytes))
    parts = [(start, min(start + rows, head.shape[0])) for start in range(0, head.shape[0], rows)]
    if head.shape == embedding.shape and all(
        torch.equal(checkpoint.read_rows(HEAD, *part), checkpoint.read_rows(EMBEDDING, *part)) for part in parts
    ):
        return
    raise FituneError(
        f"{head.file}: tensor {HEAD} is not {EMBEDDING}, but config.json says that they are one "
        f"(tie_word_embeddings); set tie_word_embeddings to false there"
    )


def _quantised_linears(model: nn.Module) -> dict[str, NF4Linear]:
    return {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, NF4Linear)}


def _source_name(parameter: str, checkpoint: Checkpoint) -> str:
    """The checkpoint's name of a parameter: PEFT's prefixes removed, a tied head read from the embedding."""
    name = parameter.removeprefix("base_model.model.").replace(".base_layer", "").replace(".token_adapter", "")
    if name == HEAD and name not in checkpoint and EMBEDDING in checkpoint:
        return EMBEDDING
    return name


def is_nf4(checkpoint: Checkpoint, name: str) -> bool:
    return f"{name}.{QUANT_STATE}" in checkpoint


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
    return {name} | _check_statistics(checkpoint, name, shape)


def _check_statistics(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> set[str]:
    """The names of a packed weight's statistics, their sizes checked against the weight's `shape`."""
    state_info = checkpoint[f"{name}.{QUANT_STATE}"]
    state = unpack_tensor_to_dict(checkpoint.read(state_info.name))
    if tuple(state["shape"]) != shape or state["blocksize"] != BLOCK:
        raise FituneError(
            f"{state_info.file}: tensor {state_info.name} is of a weight of shape {state['shape']} in blocks of "
            f"{state['blocksize']}, the model needs {shape} in blocks of {BLOCK}"
        )
    blocks = -(-math.prod(shape) // BLOCK)
    sizes = {QUANT_STATE: state_info.numel, "absmax": blocks, "quant_map": 16}
    if "nested_blocksize" in state:
        sizes |= {"nested_absmax": -(-blocks // NESTED_BLOCK), "nested_quant_map": 256}
    for part, size in sizes.items():
        info = checkpoint[f"{name}.{part}"]
        if info.numel != size:
            raise FituneError(f"{info.file}: tensor {info.name} has {info.numel} values, the model needs {size}")
    return {f"{name}.{part}" for part in sizes}


def _rebuild_rotary_embedding(model: nn.Module, device: torch.device) -> None:
    """The only buffers: frequencies computed from the config, which `to_empty` left without values."""
    backbone = decoder(model).model
    backbone.rotary_emb = type(backbone.rotary_emb)(config=backbone.config).to(device)


class _Loader:
    """Turns parameters into reads of this rank's byte ranges, and what to do with the bytes."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, placement: Placement, seed: int):
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

    def fill(self, name: str, parameter: torch.Tensor, source: str | None) -> Iterator[Step]:
        """The steps that fill one parameter, and page-lock it if it stays in host RAM."""
        local = local_part(parameter)
        start, stop = local_rows(parameter.shape[0], self.placement.shard, self.placement.shards)
        if local.shape[0] != stop - start:
            raise FituneError(f"{name}: FSDP keeps {local.shape[0]} rows here, expected {stop - start}")
        if source is None:
            local.copy_(self._initial_adapter(name, parameter.shape)[start:stop])
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
