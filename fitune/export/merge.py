"""Merges an adapter into its base: one standard Hugging Face checkpoint, whatever the size of the model.

Tensors stream from the base's safetensors to the output's, one at a time, the arithmetic in fp32 on a few rows at a
time; memory holds the largest tensor and less than 2 GiB. They are rounded at random, each tensor by its name: the
same merge writes the same bytes. The output appears under its name only when it is whole.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from fitune.config.adapter_folder import named_base
from fitune.config.base_model import ARCHITECTURES
from fitune.config.base_of_run import base_of_run
from fitune.config.hub import CONFIG_FILES, local_folder
from fitune.config.schema import Run
from fitune.errors import FituneError, UsageError
from fitune.export.adapter import AdapterFile, Lora, read_adapter
from fitune.export.check import Comparison, check_written, refuse_another_architecture
from fitune.export.merge_record import MergeRecord, write_merge_record
from fitune.export.model_card import write_model_card
from fitune.export.model_folder import write_small_files
from fitune.export.prompts import prompts_for
from fitune.export.rounding import StochasticRounding
from fitune.export.tuned_weights import TunedWeights
from fitune.output_folder import check_disk_space, new_folder, refuse_existing
from fitune.progress import bar
from fitune.weights.base_identity import (
    BaseRecord,
    base_fingerprint,
    base_mismatch,
    read_base_record,
    settle_doubt,
)
from fitune.weights.base_weights import BaseWeights, is_in_four_bits, read_base_config
from fitune.weights.model_files import copy_file, matching
from fitune.weights.round_trip import WeightsThroughNF4
from fitune.weights.safetensors_files import Checkpoint, CheckpointWriter, TensorSpec

Onto = Literal["trained", "original"]
"""The base's weights that the adapter is added to: `trained` as training computed with them, through NF4 for QLoRA;
`original` as the base stores them."""
GIVE_BASE = "give it with --base MODEL"


def merge_run(
    run: Run,
    output: Path,
    *,
    base: str | None = None,
    onto: Onto | None = None,
    force: bool = False,
    check: bool = True,
) -> Path:
    """Merges what `run`, or its checkpoint, trained into the run's base or another `base` (a folder or a Hub id)."""
    refuse_existing(output)  # before anything is downloaded
    method = run.recipe.method
    if method == "full":
        if base or onto:
            option = "--base" if base else "--onto"
            raise UsageError(f"{run.folder}: method full leaves a whole model, nothing to merge: leave out {option}")
        return merge_full(run.result_folder, output, run=run, check=check)
    if method == "lora" and onto == "trained":
        raise UsageError(f"{run.folder}: method lora trained on the original weights; leave out --onto")
    folder = local_folder(base) if base else base_of_run(run)
    onto = onto or ("trained" if method == "qlora" else None)
    return merge_adapter(folder, run.result_folder, output, onto=onto, force=force, run=run, check=check)


def merge_folder(
    adapter: Path, output: Path, *, base: str | None, onto: Onto | None, force: bool, check: bool = True
) -> Path:
    """Merges a PEFT `adapter` from anywhere into `base`, by default the one that its adapter_config.json names."""
    refuse_existing(output)
    named = (base, None) if base else named_base(adapter, GIVE_BASE)
    return merge_adapter(local_folder(*named), adapter, output, onto=onto, force=force, check=check)


def merge_adapter(
    base: Path,
    adapter: Path,
    output: Path,
    *,
    onto: Onto | None = None,
    dtype: torch.dtype = torch.bfloat16,
    progress: bool = True,
    force: bool = False,
    max_shard_bytes: int = 5 * 10**9,
    run: Run | None = None,
    check: bool = True,
) -> Path:
    """Writes base + adapter to the new folder `output` in `dtype` and returns it.

    `base` holds bf16, fp16, fp32 or bitsandbytes 4-bit weights; `adapter` is a PEFT folder that `read_adapter`
    understands; `onto` is by default what the adapter's record says it was trained on, else `original`. Everything is
    checked before anything is written: UsageError for folders that do not fit, and for a base other than the one in the
    adapter's fitune_base.json unless `force`; FituneError for damaged files and a full disk. With `check`, what was
    written answers the held-out prompts of `run` (or others) as base plus adapter does, or FituneError is raised. A
    failure or Ctrl-C leaves no output.
    """
    base, adapter, output = Path(base), Path(adapter), Path(output)
    refuse_existing(output)
    config = read_base_config(base)
    with Checkpoint(base) as checkpoint, AdapterFile(adapter) as adapter_file:
        record = read_base_record(adapter)
        onto = _onto(onto, record, checkpoint, adapter)
        weights = (WeightsThroughNF4 if onto == "trained" else BaseWeights)(checkpoint)
        lora = read_adapter(adapter_file)
        _refuse_missing_tensors(weights, config)
        tuned = TunedWeights(weights, lora, adapter_file, tied=bool(config.get("tie_word_embeddings")))
        _check_identity(adapter, record, weights, lora, adapter_file.config, force)
        specs = _output_specs(tuned, dtype)
        check_disk_space(output, sum(spec.nbytes for spec in specs))
        with new_folder(output) as unfinished:
            _write_weights(unfinished, tuned, specs, max_shard_bytes, progress)
            write_small_files(base, adapter, unfinished, _merged_config(config, tuned), dtype)
            named = record or BaseRecord(str(base), None, base_fingerprint(checkpoint))
            write_model_card(unfinished, run, named.model, named.revision, base, onto=onto)
            compared = None
            if check:
                refuse_another_architecture(unfinished, base, changed={"vocab_size", "tie_word_embeddings"})
                compared = _check(unfinished, tuned, dtype, run)
            write_merge_record(unfinished, MergeRecord.of_adapter(named, adapter, onto, dtype, compared))
    return output


def merge_full(model: Path, output: Path, *, progress: bool = True, run: Run | None = None, check: bool = True) -> Path:
    """Copies the result of method full, a standard checkpoint already, by the same rules. Returns `output`."""
    model, output = Path(model), Path(output)
    refuse_existing(output)
    config = read_base_config(model)
    with Checkpoint(model) as checkpoint:
        shards = sorted({info.file for info in checkpoint.tensors.values()})
        files = shards + matching(model, CONFIG_FILES)
        total = sum(file.stat().st_size for file in files)
        check_disk_space(output, total)
        with new_folder(output) as unfinished:
            with bar("copying", total, in_bytes=True, show=progress) as advance:
                for file in files:
                    copy_file(file, unfinished, advance)
            if run:
                write_model_card(unfinished, run, run.recipe.base.model, run.recipe.base.revision, model)
            if check:
                whole = TunedWeights(
                    BaseWeights(checkpoint), Lora(), None, tied=bool(config.get("tie_word_embeddings"))
                )
                _check(unfinished, whole, torch.float32, run)
    return output


def _onto(onto: Onto | None, record: BaseRecord | None, checkpoint: Checkpoint, adapter: Path) -> Onto:
    """What the adapter is added to. UsageError where that cannot be had."""
    in_four_bits = is_in_four_bits(checkpoint)
    if onto == "original" and in_four_bits:
        raise UsageError(
            f"{checkpoint.folder}: holds 4-bit weights only; for --onto original give the bf16 model with --base MODEL"
        )
    if onto:
        return onto
    return "trained" if in_four_bits or (record is not None and record.computed_in == "nf4") else "original"


def _check(unfinished: Path, tuned: TunedWeights, dtype: torch.dtype, run: Run | None) -> Comparison:
    vocabulary = tuned.shapes["model.embed_tokens.weight"][0]
    compared = check_written(unfinished, tuned, dtype, prompts_for(unfinished, run, vocabulary))
    print(compared if tuned.file else compared.said("the run's result"), file=sys.stderr)
    return compared


def _write_weights(folder: Path, tuned: TunedWeights, specs: list[TensorSpec], max_shard_bytes: int, progress: bool):
    writer = CheckpointWriter(folder, specs, max_shard_bytes)
    with bar("merging", sum(spec.nbytes for spec in specs), in_bytes=True, show=progress) as advance:
        for spec in specs:
            writer.write(spec.name, _merged(spec, tuned))
            advance(spec.nbytes)
    writer.close()


def _merged(spec: TensorSpec, tuned: TunedWeights) -> torch.Tensor:
    """One output tensor: summed in fp32, then rounded; what nothing changes is passed on as it is."""
    if not tuned.is_changed(spec.name) and tuned.dtype(spec.name) == spec.dtype:
        return tuned.base.checkpoint.read(tuned.stored_name(spec.name))
    merged = torch.empty(spec.shape, dtype=spec.dtype)
    rounded = _rounding(spec, tuned)
    for start, stop in tuned.row_chunks(spec.name):
        rows = tuned.merge_into(tuned.base_rows(spec.name, start, stop), spec.name, start, stop)
        finite = rows.isfinite().all()
        merged[start:stop] = rounded(rows)
        if not (finite and merged[start:stop].isfinite().all()):
            raise FituneError(
                f"tensor {spec.name}: not finite in {spec.dtype} after the merge; "
                f"the adapter or the base holds NaN or inf, or values too large for that dtype"
            )
    return merged


def _rounding(spec: TensorSpec, tuned: TunedWeights) -> Callable[[torch.Tensor], torch.Tensor]:
    """From fp32: at random where there is an update to keep, else to the nearest, which errs by less."""
    if tuned.is_changed(spec.name):
        return StochasticRounding(spec.name, spec.dtype)
    return lambda rows: rows.to(spec.dtype)


def _output_specs(tuned: TunedWeights, dtype: torch.dtype) -> list[TensorSpec]:
    """Every weight once; floating-point ones in `dtype`."""
    specs = []
    for name, shape in tuned.shapes.items():
        stored = tuned.dtype(name)
        keep = stored is not None and (not stored.is_floating_point or not shape)
        specs.append(TensorSpec(name, stored if keep else dtype, shape))
    return specs


def _merged_config(config: dict, tuned: TunedWeights) -> dict:
    """The base's config.json, with the vocabulary and the tying that the merged weights have."""
    changed = {"tie_word_embeddings": False} if config.get("tie_word_embeddings") and not tuned.ties_head else {}
    tokens = tuned.shapes.get("model.embed_tokens.weight")
    if tokens and config.get("vocab_size") not in (None, tokens[0]):
        changed["vocab_size"] = tokens[0]
    return config | changed


def _refuse_missing_tensors(weights: BaseWeights, config: dict) -> None:
    """FituneError if the base lacks a tensor of the model that its config.json describes, or has another shape.

    What fitune trains is looked at; transformers may name the tensors of others unlike their files do.
    """
    if config.get("model_type") not in ARCHITECTURES:
        return
    from transformers import AutoConfig, AutoModelForCausalLM

    described = copy.deepcopy({k: v for k, v in config.items() if k != "quantization_config"})  # for_model edits it
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**described), trust_remote_code=False)
    base, tied = weights.checkpoint.folder, config.get("tie_word_embeddings")
    for name, tensor in model.state_dict().items():
        found = weights.shapes.get(name)
        if found is None and not (tied and name == "lm_head.weight"):
            raise FituneError(f"{base}: tensor {name} is missing, which its config.json asks for")
        if found is not None and tuple(found) != tuple(tensor.shape):
            raise FituneError(
                f"{base}: tensor {name} has shape {found}, its config.json asks for {tuple(tensor.shape)}"
            )


def _check_identity(
    adapter: Path, record: BaseRecord | None, weights: BaseWeights, lora: Lora, config: dict, force: bool
) -> None:
    """Refuses a base that is not the adapter's own, as far as names, shapes and the adapter's record tell."""
    base = weights.checkpoint.folder
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
        if module != name and name not in lora.changes() and any(f".{module}".endswith(f".{t}") for t in targets):
            return f"has {name}, which the adapter does not cover"
    return None
