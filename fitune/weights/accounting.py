"""Which tensors of a checkpoint fill which parameter of the model, before memory is taken.

A packed weight in bitsandbytes' NF4 format is uint8 [n / 2, 1], beside `.absmax`, `.quant_map`, `.nested_absmax`,
`.nested_quant_map` and `.quant_state.bitsandbytes__nf4`.
"""

import math

import torch
from bitsandbytes.utils import unpack_tensor_to_dict
from torch import nn

from fitune.config.read_buffers import CHUNK_BYTES
from fitune.config.stored_weights import EMBEDDING, HEAD
from fitune.errors import FituneError
from fitune.model.nf4 import BLOCK, NESTED_BLOCK, NF4Linear
from fitune.model.skeleton import decoder, is_tied
from fitune.weights.base_weights import PACKED_PARTS
from fitune.weights.safetensors_files import Checkpoint

QUANT_STATE = "quant_state.bitsandbytes__nf4"
STATISTICS = (QUANT_STATE, *PACKED_PARTS)
"Parts of a packed weight; the nested ones only where the absmax vector is itself quantised."


def account_for_every_tensor(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str | None]:
    """Parameter name -> checkpoint tensor it is filled from (None: part of the adapter)."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    quantised = quantised_linears(model)
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


def quantised_linears(model: nn.Module) -> dict[str, NF4Linear]:
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
