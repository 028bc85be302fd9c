"""What training leaves behind: a PEFT adapter, or a whole Hugging Face checkpoint. Gathered one tensor at a time."""

import copy
import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from fitune.config.adapter_folder import ADAPTER_WEIGHTS
from fitune.config.json_file import read_json, write_json
from fitune.config.schema import Run
from fitune.data.chat_template import end_of_turn_ids, template_hash
from fitune.export.adapter import saved_name
from fitune.export.chat_record import ChatRecord, write_chat_record
from fitune.export.configs import GENERATION_CONFIG, config_for_loaders, generation_config
from fitune.export.model_card import write_model_card
from fitune.export.tokenizer_files import copy_tokenizer
from fitune.model.sharding import first_element, local_part, shard_group, share_of
from fitune.model.skeleton import decoder
from fitune.model.stochastic_rounding import rounded
from fitune.output_folder import new_folder
from fitune.weights.base_identity import BaseRecord, write_base_record
from fitune.weights.model_files import LICENCE_FILES, copy_file, matching
from fitune.weights.safetensors_files import CheckpointWriter, TensorSpec

ROUNDED_AT_ONCE = 2**18
"Elements; drawing for them takes some 8 MiB."


def save_result(
    folder: Path,
    run: Run,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    base_record: BaseRecord,
    waiting=nullcontext,
) -> dict[str, str]:
    """Writes the adapter (lora, qlora) or the model in its original dtype (full) to `folder`. Call on all ranks.

    Host RAM: tensors are gathered and written one by one, so a save needs no more than the largest. Returns the SHA-256
    of the files of weights by name, on rank 0; nothing on the others. `base_record` is what an adapter remembers of its
    base. `waiting` is entered where ranks wait for each other.
    """
    tensors = gathered_result(model, run, waiting)
    try:
        return write_result(folder, run, model, tokenizer, base_record, tensors) if dist.get_rank() == 0 else {}
    finally:
        deque(tensors, maxlen=0)  # whose disk fails takes what the others give all the same, and they go on


def gathered_result(model: nn.Module, run: Run, waiting=nullcontext) -> Iterator[torch.Tensor | None]:
    """The tensors of the adapter or the model, whole on rank 0, None elsewhere. Go through it on all ranks."""
    is_first_replica = share_of(run, dist.get_rank()).replica == 0
    for parameter, spec in named_for_saving(model, run):
        whole = None
        if is_first_replica:
            with waiting():
                whole = gather_rows(as_on_disk(parameter, spec), parameter.shape[0], shard_group(parameter))
        yield whole


def write_result(
    folder: Path,
    run: Run,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    base_record: BaseRecord,
    tensors: Iterable[torch.Tensor],
) -> dict[str, str]:
    """Writes what `gathered_result` gave, and what belongs beside it. Returns the weights' SHA-256 by file name."""
    specs = [spec for _, spec in named_for_saving(model, run)]
    adapter_file = ADAPTER_WEIGHTS if isinstance(model, PeftModel) else None
    with new_folder(folder, replace=True) as unfinished:
        writer = CheckpointWriter(unfinished, specs, one_file=adapter_file, hashed=True)
        for spec, tensor in zip(specs, tensors, strict=True):
            writer.write(spec.name, tensor)
        writer.close()
        _write_companions(unfinished, run, model, tokenizer, base_record)
    return writer.hashes


def as_on_disk(parameter: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """This rank's rows of a parameter in host RAM, in the dtype on disk.

    float32 weights become bf16 up or down by chance, right on average: to the nearest, a change of less than half of
    bf16's last digit would be lost, which most changes of fine-tuning are. What is drawn follows from the tensor's name
    and the element's place, whatever the ranks, and whatever draws: a GPU also for weights in host RAM, where 8B would
    take minutes.
    """
    local = local_part(parameter.detach())
    if (local.dtype, spec.dtype) != (torch.float32, torch.bfloat16):
        return local.cpu().to(spec.dtype).contiguous()
    key = int.from_bytes(hashlib.sha256(spec.name.encode()).digest()[:4], "little")
    flat, first = local.reshape(-1), first_element(parameter)
    device = torch.device("cuda") if torch.cuda.is_initialized() else flat.device
    rows = torch.empty(flat.shape, dtype=torch.bfloat16)
    for start in range(0, flat.numel(), ROUNDED_AT_ONCE):
        piece = flat[start : start + ROUNDED_AT_ONCE].to(device, copy=True)
        rows[start : start + ROUNDED_AT_ONCE] = rounded(piece, key, first + start)
    return rows.view(local.shape)


def gather_rows(local: torch.Tensor, rows: int, group: dist.ProcessGroup | None) -> torch.Tensor | None:
    """The whole tensor of `rows` rows in host RAM on the first of `group`'s ranks, None on the others, from each one's.

    No GPU memory is used. Call on all ranks of `group`; None: nothing is sharded.
    """
    if group is None or group.size() == 1:
        return local
    shards, rank = group.size(), group.rank()
    chunk = -(-rows // shards)
    padded = local if local.shape[0] == chunk else local.new_empty((chunk, *local.shape[1:]))
    padded[: local.shape[0]] = local
    whole = local.new_empty((chunk * shards, *local.shape[1:])) if rank == 0 else None
    parts = list(whole.chunk(shards)) if rank == 0 else None
    dist.gather(padded, parts, group=group, group_dst=0)  # CPU tensors: over gloo
    return whole[:rows] if rank == 0 else None  # only the last ranks' chunks are short


def named_for_saving(model: nn.Module, run: Run) -> list[tuple[torch.Tensor, TensorSpec]]:
    """Parameters to save with their names and dtypes on disk: PEFT's for an adapter, Llama's for a whole model."""
    if run.recipe.method == "full":
        dtype = decoder(model).config.dtype
        return [(p, TensorSpec(name, dtype, tuple(p.shape))) for name, p in model.named_parameters()]
    return [
        (p, TensorSpec(saved_name(name), p.dtype, tuple(p.shape)))
        for name, p in model.named_parameters()
        if p.requires_grad
    ]


def _write_companions(folder: Path, run: Run, model: nn.Module, tokenizer, base_record: BaseRecord) -> None:
    """Tokenizer, configs and records: the base's own files, with what was trained put in."""
    base = Path(tokenizer.name_or_path)
    copy_tokenizer(base, folder, template=tokenizer.chat_template, pad_token=tokenizer.pad_token)
    base_config = read_json(base / "config.json", "give a model's folder")
    stop_ids = end_of_turn_ids(tokenizer)
    write_chat_record(folder, ChatRecord(template_hash(tokenizer), run.recipe.data.system_message))
    generation = generation_config(base, stop_ids=stop_ids, default_stop=base_config.get("eos_token_id"))
    write_json(folder / GENERATION_CONFIG, generation)
    if isinstance(model, PeftModel):
        config = copy.deepcopy(model.peft_config["default"])
        config.base_model_name_or_path, config.revision = run.recipe.base.model, base_record.revision
        config.inference_mode = True
        config.save_pretrained(folder)
        computed_in = "nf4" if run.recipe.method == "qlora" else "stored"
        write_base_record(folder, replace(base_record, computed_in=computed_in))
    else:
        dtype = str(decoder(model).config.dtype).removeprefix("torch.")
        write_json(folder / "config.json", config_for_loaders(base_config, dtype))
        for file in matching(base, LICENCE_FILES):
            copy_file(file, folder)
    write_model_card(folder, run, run.recipe.base.model, base_record.revision if base_record else None, base)
