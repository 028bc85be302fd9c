"""What a checkpoint costs at 70B LoRA size: python benchmarks/save.py RESULT.json [--folder ON_THE_DISK]

Writes, flushes, hashes and reads back what one rank saves of a rank-16 adapter on all linears, with AdamW's state, by
the functions that training uses. Beside it stands what the same disk takes of a plain file of that size.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from random_checkpoint import config, tensors
from tier_run import GIB, about

from fitune.output_folder import rename_when_whole
from fitune.training.state import training_state, write_training_state
from fitune.weights.quantize import is_quantised
from fitune.weights.safetensors_files import CheckpointWriter, TensorSpec

RANK = 16
SECONDS_BETWEEN_SAVES = 600


class Adapter(nn.Module):
    """The LoRA weights of the 70B shape, split over one rank as FSDP leaves them."""

    def __init__(self):
        super().__init__()
        mesh = init_device_mesh("cpu", (1,))
        for name, shape in tensors(config("70b", None)):
            if is_quantised(name, shape):
                for part, size in (("lora_A", (RANK, shape[1])), ("lora_B", (shape[0], RANK))):
                    weight = nn.Parameter(distribute_tensor(torch.randn(size), mesh, [Shard(0)]))
                    self.register_parameter(name.replace(".", "_") + part, weight)


def trained_once(model: Adapter) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def plain_write_seconds(folder: Path, nbytes: int) -> float:
    block, started = os.urandom(2**26), time.perf_counter()
    with (folder / "plain").open("wb") as stream:
        for _ in range(nbytes // len(block)):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
    return time.perf_counter() - started


def saved(folder: Path, model: Adapter, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Seconds by what they go to."""
    partial, marks = folder / ".checkpoint-1.partial", [time.perf_counter()]
    mark = lambda: marks.append(time.perf_counter())  # noqa: E731
    (partial / "adapter").mkdir(parents=True)
    weights = dict(model.named_parameters())
    specs = [TensorSpec(n, p.dtype, tuple(p.shape)) for n, p in weights.items()]
    writer = CheckpointWriter(partial / "adapter", specs, one_file="adapter_model.safetensors", hashed=True)
    for name, parameter in weights.items():
        writer.write(name, parameter.to_local())
    writer.close()
    mark()
    write_training_state(partial, training_state(model, optimizer, 1, weights=False), 0)
    mark()
    rename_when_whole(partial, folder / "checkpoint-1", replace=False)
    mark()
    steps = ("adapter", "training state", "rename")
    seconds = {name: round(b - a, 2) for name, a, b in zip(steps, marks, marks[1:], strict=False)}
    return seconds | {"total": round(marks[-1] - marks[0], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; the system's temporary folder otherwise")
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo")
    model = Adapter()
    optimizer = trained_once(model)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        seconds = saved(folder, model, optimizer)
        nbytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        plain = plain_write_seconds(folder, nbytes)
    result = {
        "benchmark": "a checkpoint of a 70B adapter, one rank",
        "checkpoint_gib": round(nbytes / GIB, 2),
        "seconds": seconds,
        "plain_write_seconds": round(plain, 2),
        "share_of_training_time": round(seconds["total"] / (seconds["total"] + SECONDS_BETWEEN_SAVES), 4),
        "cores": os.cpu_count(),
    } | about(options.commit)
    options.result.write_text(json.dumps(result | {"command": " ".join(["python", *sys.argv])}, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
