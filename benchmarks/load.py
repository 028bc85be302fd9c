"""How fast a 4-bit checkpoint is loaded, beside a plain sequential read of the same files from the same cold disk.

    python benchmarks/load.py CHECKPOINT RESULT.json --recipe llama3_8b_qlora --profile single_gpu

Runs as one rank of the profile, on the GPU where there is one. What is timed is what training does between reading the
run and the first step: skeleton, sharding, reading, the copies to the GPU.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tier_run import about, read_cold

from fitune.data.dataset import load_tokenizer
from fitune.planning.fill import resolve
from fitune.training.distributed import compute_device, join, leave
from fitune.training.measure import Loading
from fitune.training.train import load_sharded_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as output:
        run = resolve(options.recipe, options.profile, (f"base.model={options.checkpoint}",), output)
    if not torch.cuda.is_available():
        run = run.model_copy(update={"accelerate": run.accelerate.model_copy(update={"use_cpu": True})})
    mesh = join(run)
    tokenizer = load_tokenizer(run.recipe, options.checkpoint)
    torch.zeros(1, device=compute_device(mesh))  # what CUDA itself takes to start is not the loader's
    result = read_cold(options.checkpoint)
    with Loading() as loading:
        load_sharded_model(run, options.checkpoint, tokenizer, mesh)
    result["load_seconds"] = loading.report["seconds"]
    leave()
    result["share_of_plain_read"] = round(result["plain_read_seconds"] / result["load_seconds"], 3)
    result = {"benchmark": "load", "recipe": options.recipe, "tier": options.profile} | result | about(options.commit)
    options.result.write_text(json.dumps(result | {"command": " ".join(["python", *sys.argv])}, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
