"""Peak memory and speed of `merge` on a random model of several GiB: python benchmarks/merge.py RESULT.json

Builds a bf16 base in a model's true shape (1B: 2.5 GB; its run of 23 November had a head of its own), of all its
layers or of a few, and a rank-16 adapter on its linears, merges them in a process of its own, through NF4 and with its
check, and writes that process's peak resident memory beside the largest tensor's size. The peak does not hang on the
number of layers (`tests/export/test_merge_memory.py`).
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fitune.weights.quantize import is_quantised  # noqa: E402
from fitune.weights.safetensors_files import Checkpoint, CheckpointWriter, TensorSpec  # noqa: E402

GIB = 2**30
RANK = 16
MERGE = """
import sys
from pathlib import Path
from fitune.export.merge import merge_adapter
merge_adapter(*map(Path, sys.argv[1:]), onto="trained", progress=False)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024)
"""


def write_adapter(base: Path, folder: Path) -> None:
    """A PEFT adapter with random values on every linear of the decoder layers."""
    folder.mkdir()
    pairs = []
    with Checkpoint(base) as checkpoint:
        for name, info in checkpoint.tensors.items():
            if is_quantised(name, info.shape):
                module = f"base_model.model.{name.removesuffix('.weight')}"
                pairs.append((f"{module}.lora_A.weight", (RANK, info.shape[1])))
                pairs.append((f"{module}.lora_B.weight", (info.shape[0], RANK)))
    writer = CheckpointWriter(folder, [TensorSpec(name, torch.float32, shape) for name, shape in pairs])
    for name, shape in pairs:
        writer.write(name, torch.randn(shape) * 0.01)
    writer.close()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--shape", default="1b")
    parser.add_argument("--layers", type=int, help="[default: the shape's]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make = [sys.executable, ROOT / "benchmarks" / "random_checkpoint.py", folder / "base", "--shape", options.shape]
        fewer = ["--layers", str(options.layers)] if options.layers else []
        subprocess.run([*make, "--format", "bf16", *fewer], check=True)
        write_adapter(folder / "base", folder / "adapter")
        with Checkpoint(folder / "base") as checkpoint:
            sizes = [info.nbytes for info in checkpoint.tensors.values()]
        started = time.perf_counter()
        command = [sys.executable, "-c", MERGE, folder / "base", folder / "adapter", folder / "merged"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        result = {
            "benchmark": "merge",
            "model_gib": round(sum(sizes) / GIB, 2),
            "largest_tensor_gib": round(max(sizes) / GIB, 2),
            "peak_rss_gib": round(int(done.stdout) / GIB, 2),
            "seconds": round(time.perf_counter() - started, 1),
            "hardware": "CPU",
            "torch": torch.__version__,
            "date": datetime.date.today().isoformat(),
            "commit": subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip(),
            "command": " ".join(["python benchmarks/merge.py", str(options.result), "--shape", options.shape, *fewer]),
        }
    options.result.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
