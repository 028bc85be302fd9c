"""Trains the same steps on other numbers of ranks, offloaded or not, and compares losses and gradient norms.

    python benchmarks/same_losses.py OUTPUT.json --recipe llama3_8b_qlora --reference single_gpu \
        --compare fsdp_offload_1x24gb fsdp_4x24gb fsdp_offload_4gpu --set base.model=FOLDER --set data.prepared=FOLDER

A number instead of a profile stands for so many GPUs with all weights on them.
The reference runs several times: how far these are apart is the noise that the others are held against. Dropout is off,
it draws other numbers on other ranks. On few big GPUs, --cap-gib lets the ranks share them, and all runs train at once.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

from tier_run import about

ROOT = Path(__file__).resolve().parents[1]
METRICS = ("loss", "grad_norm")


def train(options, profile: str, output: Path) -> list[dict[str, float]]:
    """Loss and gradient norm of every step of one run of `cli.py train`."""
    sets = {
        "training.max_steps": options.steps, "training.logging_steps": 1, "training.save_strategy": "'no'",
        "training.report_to": "none", "lora.dropout": 0, "global_batch_size": options.global_batch_size,
        "profile.micro_batch": 1,
    }  # fmt: skip
    items = [*(f"{key}={value}" for key, value in sets.items()), *options.set]
    command = [sys.executable, "cli.py", "train", options.recipe, "--profile", profile, "--output", str(output)]
    command += [part for item in items for part in ("--set", item)]
    cap = {"FITUNE_GPU_CAP_GIB": str(options.cap_gib)} if options.cap_gib else {}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | cap, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise SystemExit(f"{profile}: {done.stdout[-1000:]}{done.stderr[-3000:]}")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: line[key] for key in METRICS} for line in lines if "loss" in line]


def profile_of(name: str, folder: Path) -> str:
    """A profile's name; for a number, the file of a profile of so many GPUs, written into `folder`."""
    if not name.isdigit():
        return name
    settings = (
        f"distributed_type: FSDP\nfsdp_config:\n  fsdp_version: 2\nmixed_precision: bf16\nnum_processes: {name}\n"
    )
    (folder / "accelerate.yaml").write_text(settings + "main_process_port: 0\n", encoding="utf-8")
    profile = {
        "description": f"{name} GPUs, weights on them.", "accelerate_config": str(folder / "accelerate.yaml"),
        "num_gpus": int(name), "gpu_memory_gib": 80, "host_memory_gib": 64, "fits": {"any": ["qlora", "lora", "full"]},
        "micro_batch": "auto", "kept_layers": "auto",
    }  # fmt: skip
    (folder / f"{name}_gpus.yaml").write_text(json.dumps(profile), encoding="utf-8")
    return str(folder / f"{name}_gpus.yaml")


def furthest(curve: list[dict], reference: list[dict]) -> dict[str, float]:
    """The largest relative difference of each metric over all steps."""
    pairs = list(zip(curve, reference, strict=True))
    return {key: max(abs(a[key] - b[key]) / abs(b[key]) for a, b in pairs) for key in METRICS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--reference", required=True, metavar="PROFILE")
    parser.add_argument("--compare", nargs="+", required=True, metavar="PROFILE")
    parser.add_argument("--repeats", type=int, default=2, help="further runs of the reference")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--global-batch-size", type=int, default=4)
    parser.add_argument("--cap-gib", type=float, help="torch's memory per rank, where ranks share one GPU")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    result = {"benchmark": "same losses", "recipe": options.recipe, "steps": options.steps, "runs": {}}
    result |= about(options.commit) | {"command": " ".join(["python", *sys.argv])}
    identical = ["reference", *(f"repeated-{number + 1}" for number in range(options.repeats))]
    runs = dict.fromkeys(identical, options.reference) | {profile: profile for profile in options.compare}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(runs) if options.cap_gib else 1) as pool:
        trained = {
            label: pool.submit(train, options, profile_of(profile, Path(folder)), Path(folder) / label)
            for label, profile in runs.items()
        }
    curves = {label: run.result() for label, run in trained.items()}
    for label, curve in curves.items():
        distance = furthest(curve, curves["reference"])
        result["runs"][label] = {"profile": runs[label], "furthest": distance, "curve": curve}
        print(label, runs[label], distance, curve[0], curve[-1], flush=True)
    noise = [furthest(curves[one], curves[other]) for one, other in combinations(identical, 2)]
    result["noise"] = {metric: max(pair[metric] for pair in noise) for metric in METRICS} if noise else None
    print("noise of identical runs", result["noise"], flush=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
