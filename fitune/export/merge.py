"""Merges an adapter into its base: one standard Hugging Face checkpoint, whatever the size of the model.

Tensors stream from the base's safetensors to the output's, one at a time, the arithmetic in fp32 on a few rows at a
time; memory holds the largest tensor plus about half a GiB. The output appears under its name only when it is whole.
"""

import sys
from pathlib import Path

import torch

from fitune.config.hub import CONFIG_FILES, local_folder
from fitune.config.schema import Run
from fitune.errors import FituneError, UsageError
from fitune.export.adapter import AdapterFile, Lora, read_adapter
from fitune.export.model_folder import write_small_files
from fitune.output_folder import check_disk_space, new_folder, refuse_existing
from fitune.weights.base_identity import base_fingerprint, base_mismatch, read_base_record, settle_doubt
from fitune.weights.base_weights import BaseWeights, read_base_config
from fitune.weights.model_files import copy_file, matching
from fitune.weights.safetensors_files import Checkpoint, CheckpointWriter, TensorSpec


def merge_run(run: Run, result: Path, output: Path, *, base: str | None = None, force: bool = False) -> Path:
    """Merges `result`, a folder that `run` trained, into the run's base or another `base` (a folder or a Hub id)."""
    refuse_existing(output)  # before anything is downloaded
    if run.recipe.method == "full":
        if base:
            raise UsageError(f"{run.folder}: method full leaves a whole model, nothing to merge into --base")
        return merge_full(result, output)
    trained_on = run.recipe.base
    folder = local_folder(base) if base else local_folder(trained_on.model, trained_on.revision)
    return merge_adapter(folder, result, output, force=force)


def merge_adapter(
    base: Path,
    adapter: Path,
    output: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    progress: bool = True,
    force: bool = False,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Writes base + adapter to the new folder `output` in `dtype` and returns it.

    `base` holds bf16, fp16, fp32 or bitsandbytes 4-bit weights; `adapter` is a PEFT folder with LoRA on linear layers
    and, perhaps, trained token rows. Everything is checked before anything is written: UsageError for folders that do
    not fit, and for a base other than the one in the adapter's fitune_base.json unless `force`; FituneError for damaged
    files and a full disk. A failure or Ctrl-C leaves no output.
    """
    base, adapter, output = Path(base), Path(adapter), Path(output)
    refuse_existing(output)
    config = read_base_config(base)
    with Checkpoint(base) as checkpoint, AdapterFile(adapter) as adapter_file:
        weights = BaseWeights(checkpoint)
        lora = read_adapter(adapter_file)
        _refuse_missing_tensors(weights, config)
        _check_targets(lora, adapter_file, weights)
        _check_identity(adapter, weights, lora, adapter_file.config, force)
        specs = _output_specs(weights, dtype)
        check_disk_space(output, sum(spec.nbytes for spec in specs))
        with new_folder(output) as unfinished, _progress_bar(progress) as bar:
            writer = CheckpointWriter(unfinished, specs, max_shard_bytes)
            task = bar.add_task("merging", total=sum(spec.nbytes for spec in specs))
            for spec in specs:
                writer.write(spec.name, _merged(spec, weights, lora, adapter_file))
                bar.advance(task, spec.nbytes)
            writer.close()
            write_small_files(base, adapter, unfinished, config, dtype)
    return output


def merge_full(model: Path, output: Path, *, progress: bool = True) -> Path:
    """Copies the result of method full, a standard checkpoint already, by the same rules. Returns `output`."""
    model, output = Path(model), Path(output)
    refuse_existing(output)
    read_base_config(model)
    with Checkpoint(model) as checkpoint:
        shards = sorted({info.file for info in checkpoint.tensors.values()})
    files = shards + matching(model, CONFIG_FILES)
    total = sum(file.stat().st_size for file in files)
    check_disk_space(output, total)
    with new_folder(output) as unfinished, _progress_bar(progress) as bar:
        task = bar.add_task("copying", total=total)
        for file in files:
            copy_file(file, unfinished, lambda count: bar.advance(task, count))
    return output


def _merged(spec: TensorSpec, weights: BaseWeights, lora: Lora, file: AdapterFile) -> torch.Tensor:
    """One output tensor: the base's weight plus scale * B @ A in fp32, or the trained rows, then cast."""
    pair, tokens = lora.pairs.get(spec.name), lora.tokens.get(spec.name)
    if not pair and not tokens and weights.dtype(spec.name) == spec.dtype:
        return weights.checkpoint.read(spec.name)
    merged = torch.empty(spec.shape, dtype=spec.dtype)
    a, b = (file.read(pair.a).float(), file.read(pair.b).float()) if pair else (None, None)
    for start, stop in weights.row_chunks(spec.name):
        chunk = weights.rows(spec.name, start, stop).to(torch.float32, copy=True)
        if pair:
            chunk.addmm_(b[start:stop], a, alpha=pair.scale)
        merged[start:stop] = chunk
    if tokens:
        merged[tokens[1]] = file.read(tokens[0]).to(spec.dtype)
    for start, stop in weights.row_chunks(spec.name):
        if not merged[start:stop].isfinite().all():
            raise FituneError(
                f"tensor {spec.name}: not finite in {spec.dtype} after the merge; "
                f"the adapter or the base holds NaN or inf, or values too large for that dtype"
            )
    return merged


def _output_specs(weights: BaseWeights, dtype: torch.dtype) -> list[TensorSpec]:
    """Every weight once; floating-point ones in `dtype`."""
    specs = []
    for name, shape in weights.shapes.items():
        stored = weights.dtype(name)
        keep = stored is not None and (not stored.is_floating_point or not shape)
        specs.append(TensorSpec(name, stored if keep else dtype, shape))
    return specs


def _check_targets(lora: Lora, file: AdapterFile, weights: BaseWeights) -> None:
    """Every tensor of the adapter fits a weight of the base."""
    where, base = file.folder / "adapter_model.safetensors", weights.checkpoint.folder
    for name in [*lora.pairs, *lora.tokens]:
        if name not in weights.shapes:
            raise UsageError(f"{where}: adapts {name}, which {base} does not have; give the base it was trained on")
        needed = weights.shapes[name]
        if name in lora.pairs:
            given = (file[lora.pairs[name].b].shape[0], file[lora.pairs[name].a].shape[1])
            fits = given == needed
        else:
            tensor, rows = lora.tokens[name]
            given = file[tensor].shape
            fits = given[1:] == needed[1:] and max(rows) < needed[0]
        if not fits:
            raise UsageError(f"{where}: {name}: the adapter is for shape {given}, {base} has {needed}; wrong base?")


def _refuse_missing_tensors(weights: BaseWeights, config: dict) -> None:
    """FituneError if the base lacks a tensor of the Llama that its config.json describes, or has another shape."""
    if config.get("model_type") != "llama":
        return
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_dict({k: v for k, v in config.items() if k != "quantization_config"}))
    base, tied = weights.checkpoint.folder, config.get("tie_word_embeddings")
    for name, tensor in model.state_dict().items():
        found = weights.shapes.get(name)
        if found is None and not (tied and name == "lm_head.weight"):
            raise FituneError(f"{base}: tensor {name} is missing, which its config.json asks for")
        if found is not None and tuple(found) != tuple(tensor.shape):
            raise FituneError(
                f"{base}: tensor {name} has shape {found}, its config.json asks for {tuple(tensor.shape)}"
            )


def _check_identity(adapter: Path, weights: BaseWeights, lora: Lora, config: dict, force: bool) -> None:
    """Refuses a base that is not the adapter's own, as far as names, shapes and the adapter's record tell."""
    record, base = read_base_record(adapter), weights.checkpoint.folder
    if record is not None:
        doubt = base_mismatch(record, base_fingerprint(weights.checkpoint))
    else:
        doubt = _unadapted(weights, lora, config)
    if said := settle_doubt(base, adapter, doubt, recorded=record is not None, force=force):
        print(said, file=sys.stderr)


def _unadapted(weights: BaseWeights, lora: Lora, config: dict) -> str | None:
    """A linear layer of the base that the adapter means to adapt, and does not: a base with more layers."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or config.get("layers_to_transform") or config.get("exclude_modules"):
        return None
    for name in weights.shapes:
        module = name.removesuffix(".weight")
        if module != name and name not in lora.pairs and any(f".{module}".endswith(f".{t}") for t in targets):
            return f"has {name}, which the adapter does not cover"
    return None


def _progress_bar(enabled: bool):
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    console = Console(stderr=True)
    return Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console, disable=not enabled)
