"""Merging holds one tensor at a time: its peak memory, of a process of its own."""

import ctypes
import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import memory_mib, run_alone
from transformers import LlamaConfig, LlamaForCausalLM

from fitune.export.merge import merge_adapter
from fitune.weights.safetensors_files import CheckpointWriter, TensorSpec

MOST_ARENAS = -8
"mallopt's M_ARENA_MAX: freed memory of threads that are gone is used again (malloc.h)."


def _peak_mib(base: Path, adapter: Path, out: Path, onto: str) -> float:
    ctypes.CDLL(None).mallopt(MOST_ARENAS, 1)
    memory_mib("VmHWM:", forget_peak=True)
    merge_adapter(base, adapter, out, onto=onto, progress=False)
    return memory_mib("VmHWM:")


def _fill(folder, names_and_shapes, dtype, file_name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    specs = [TensorSpec(name, dtype, shape) for name, shape in names_and_shapes.items()]
    writer = CheckpointWriter(folder, specs)
    for spec in specs:
        writer.write(spec.name, torch.full(spec.shape, 0.01, dtype=dtype))
    writer.close()
    (folder / "model.safetensors").rename(folder / file_name)


def _big_model(folder: Path, layers: int, rank: int = 64) -> tuple[Path, Path]:
    """A Llama of 33 MiB a layer in bf16 and an adapter; contents do not matter here."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers, num_attention_heads=8
    )
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in LlamaForCausalLM(config).state_dict().items()}
    _fill(folder / "base", shapes, torch.bfloat16)
    config.save_pretrained(folder / "base")
    pairs = {}
    for name, (out, *into) in shapes.items():
        if into and ".layers." in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            pairs |= {f"{module}.lora_A.weight": (rank, *into), f"{module}.lora_B.weight": (out, rank)}
    _fill(folder / "adapter", pairs, torch.float32, "adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 8})
    )
    return folder / "base", folder / "adapter"


@pytest.mark.parametrize("onto", ["original", "trained"])
def test_peak_memory_does_not_depend_on_the_models_size(tmp_path, onto):
    """Merged and checked, 264 MiB of weights need no more than 66 do, but for what the allocator happens to keep."""
    peaks = {}
    for layers in (2, 8):
        folder = tmp_path / str(layers)
        folder.mkdir()
        peaks[layers] = run_alone(_peak_mib, *_big_model(folder, layers), folder / "out", onto)
        shutil.rmtree(folder)
    assert peaks[8] - peaks[2] < 100, peaks  # half of what they differ by
    assert peaks[8] < 1280, peaks
