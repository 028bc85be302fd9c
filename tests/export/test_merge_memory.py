"""Merging holds one tensor at a time: its peak memory, of a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from fitune.weights.safetensors_files import CheckpointWriter, TensorSpec

ROOT = Path(__file__).resolve().parents[2]
MEASURE = """
import sys
from pathlib import Path
from fitune.export.merge import merge_adapter
merge_adapter(*map(Path, sys.argv[1:]), progress=False)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
"VmHWM, not ru_maxrss, which a child inherits from the process that started it. In KiB."


def _peak_mib(base, adapter, out) -> float:
    command = [sys.executable, "-c", MEASURE, base, adapter, out]
    steady = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=steady)
    return int(done.stdout) / 1024


def _fill(folder, names_and_shapes, dtype, file_name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    specs = [TensorSpec(name, dtype, shape) for name, shape in names_and_shapes.items()]
    writer = CheckpointWriter(folder, specs)
    for spec in specs:
        writer.write(spec.name, torch.full(spec.shape, 0.01, dtype=dtype))
    writer.close()
    (folder / "model.safetensors").rename(folder / file_name)


def _big_model(folder: Path, layers: int, rank: int = 64) -> tuple[Path, Path]:
    """`layers` MLP weights of 16 MiB in bf16 and their adapter; contents do not matter here."""
    modules = [f"model.layers.{i}.mlp.up_proj" for i in range(layers)]
    _fill(folder / "base", {f"{m}.weight": (4096, 2048) for m in modules}, torch.bfloat16)
    (folder / "base" / "config.json").write_text("{}")
    pairs = {f"base_model.model.{m}.lora_A.weight": (rank, 2048) for m in modules}
    pairs |= {f"base_model.model.{m}.lora_B.weight": (4096, rank) for m in modules}
    _fill(folder / "adapter", pairs, torch.float32, "adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 8})
    )
    return folder / "base", folder / "adapter"


def test_peak_memory_does_not_depend_on_the_models_size(tmp_path):
    """256 MiB of weights need no more than 32 MiB do, but for what the allocator happens to keep."""
    peaks = {}
    for layers in (2, 16):
        folder = tmp_path / str(layers)
        folder.mkdir()
        peaks[layers] = _peak_mib(*_big_model(folder, layers), folder / "out")
        shutil.rmtree(folder)
    assert peaks[16] - peaks[2] < 112, peaks  # half of what they differ by
    assert peaks[16] < 1024, peaks
