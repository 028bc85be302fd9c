"""Writes a model once in bitsandbytes' NF4 format, so that later starts read a quarter of the bytes.

The output is what transformers' `save_pretrained` writes for a 4-bit model with double quantisation: any tool that
reads those can read it. Linears of the decoder layers are quantised, everything else is copied in its own dtype.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from bitsandbytes.functional import quantize_4bit

from fitune.errors import UsageError
from fitune.model.nf4 import BLOCK, NESTED_BLOCK
from fitune.output_folder import check_disk_space, new_folder
from fitune.progress import bar
from fitune.weights.accounting import QUANT_STATE, is_nf4
from fitune.weights.base_weights import read_base_config
from fitune.weights.model_files import LICENCE_FILES, TOKENIZER_FILES, copy_file, copy_templates_by_name, matching
from fitune.weights.safetensors_files import Checkpoint, CheckpointWriter, TensorInfo, TensorSpec

QUANT_STATE_BYTES = 256
"""Room for the JSON text of a quantisation state, whose length depends on the digits of one number; spaces fill it."""
QUANTIZATION_CONFIG = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
}


def quantize(
    model: Path, output: Path, device: torch.device, check: Callable[[Path], object] = lambda written: None
) -> Path:
    """Writes the NF4 version of `model` to `output`, one tensor in memory at a time. UsageError if it is quantised.

    `check` is called with what was written, before it gets its name; where it raises an error, nothing is left.
    """
    config = read_base_config(model)
    with Checkpoint(model) as source, new_folder(output) as folder:
        already = next((name for name in source.tensors if is_nf4(source, name)), None)
        if already:
            raise UsageError(f"{model}: is quantised already ({already})")
        specs = [spec for info in source.tensors.values() for spec in _specs(info)]
        check_disk_space(output, sum(spec.nbytes for spec in specs))
        writer = CheckpointWriter(folder, specs)
        with bar("quantising", len(source.tensors)) as advance:
            for name, info in source.tensors.items():
                tensor = source.read(name)
                parts = nf4_parts(name, tensor.to(device)) if is_quantised(info.name, info.shape) else {name: tensor}
                for key, value in parts.items():
                    writer.write(key, value)
                advance()
        writer.close()
        for file in matching(
            model, [*TOKENIZER_FILES, *LICENCE_FILES, "chat_template.jinja", "generation_config.json"]
        ):
            copy_file(file, folder)
        copy_templates_by_name(model, folder)
        config["quantization_config"] = QUANTIZATION_CONFIG
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        check(folder)
    return output


def is_quantised(name: str, shape: tuple[int, ...]) -> bool:
    """Whether QLoRA stores this weight as NF4: the matrices of the decoder layers."""
    return name.startswith("model.layers.") and len(shape) == 2


def nf4_parts(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that `weight` [out, in] is stored as: packed bytes and their statistics, by full name."""
    packed, state = quantize_4bit(weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    statistics = state.as_dict(packed=True)
    text = statistics[QUANT_STATE]
    padding = text.new_full((QUANT_STATE_BYTES - len(text),), ord(" "))
    statistics[QUANT_STATE] = torch.cat([text, padding])
    return {name: packed, **{f"{name}.{key}": value for key, value in statistics.items()}}


def _specs(info: TensorInfo) -> list[TensorSpec]:
    if not is_quantised(info.name, info.shape):
        return [TensorSpec(info.name, info.dtype, info.shape)]
    return nf4_specs(info.name, info.shape)


def nf4_specs(name: str, shape: tuple[int, ...]) -> list[TensorSpec]:
    """What `nf4_parts` will give for a weight of `shape`, in its order."""
    numel = shape[0] * shape[1]
    blocks = -(-numel // BLOCK)
    return [
        TensorSpec(name, torch.uint8, (-(-numel // 2), 1)),
        TensorSpec(f"{name}.absmax", torch.uint8, (blocks,)),
        TensorSpec(f"{name}.quant_map", torch.float32, (16,)),
        TensorSpec(f"{name}.nested_absmax", torch.float32, (-(-blocks // NESTED_BLOCK),)),
        TensorSpec(f"{name}.nested_quant_map", torch.float32, (256,)),
        TensorSpec(f"{name}.{QUANT_STATE}", torch.uint8, (QUANT_STATE_BYTES,)),
    ]
