"""Trains what the search finds beside the named preset, each rank held to the preset's card.

    python benchmarks/found.py OUTPUT_FOLDER --tokenizer FOLDER llama3_8b_qlora=single_gpu llama3_8b_lora=fsdp_2x40gb

`train RECIPE`, without a profile, sees the machine's GPUs with no more memory than the preset's: a stand-in for
nvidia-smi says so. The runs go one after the other, alone on the machine, through `cli.py train`. Checkpoints are
random, of the true shape, and stay in the work folder.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tier_run import about, run_tier, torch_gib
from tiers import Results, Task, prepare, run_alone

from fitune.config.run import load_profile
from fitune.planning.hardware import FIELDS

STEPS, SECONDS = 10, 30
STAND_IN = """#!/bin/sh
# nvidia-smi, with no more than {mib} MiB a card.
case "$1" in
  --query-gpu={fields}*) {real} "$@" | awk -F', ' -v OFS=', ' '{{for (i = 3; i <= 4; i++) if ($i > {mib}) $i = {mib}; print}}' ;;
  *) exec {real} "$@" ;;
esac
"""  # noqa: E501


def smaller_cards(folder: Path, gib: float) -> dict[str, str]:
    """The environment in which nvidia-smi says that each card has `gib`."""
    folder.mkdir(parents=True, exist_ok=True)
    said = STAND_IN.format(mib=round(gib * 1024), fields=",".join(FIELDS), real=shutil.which("nvidia-smi"))
    (folder / "nvidia-smi").write_text(said)
    (folder / "nvidia-smi").chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def runs_of(pair: str, work: Path) -> tuple[dict, dict]:
    """The run that is found, and the preset's: plans as `tier_run` takes them."""
    recipe, preset = pair.split("=")
    gib = load_profile(preset).gpu_memory_gib
    plan = {
        "recipe": recipe, "cap_gib": torch_gib(gib), "steps": STEPS,
        "seconds": SECONDS, "set": ["training.save_strategy='no'"], "data": str(work / "data"),
        "checkpoint": str(work / ("8b-nf4" if recipe.endswith("qlora") else "8b-bf16")),
        "environment": smaller_cards(work / f"cards-{gib:g}", gib),
    }  # fmt: skip
    label = f"{torch.cuda.device_count()} cards of {gib:g} GB"
    return plan | {"profile": None, "label": label}, plan | {"profile": preset, "label": label}


def name_of(plan: dict) -> str:
    return f"{plan['recipe']} {plan['profile'] or 'found'}, {plan['label']}"


def in_one_line(name: str, result: dict) -> str:
    """What a reader compares."""
    if not result.get("ok"):
        return f"{name}: failed: {str(result.get('error', 'no time'))[-300:]}"
    tokens = result["tokens_per_second_per_gpu"] * result["num_gpus"]
    layers = f"{result['kept_layers']} of {result['layers']} layers kept"
    return (
        f"{name}: {tokens:,.0f} tokens/s of {result['num_gpus']} GPUs, {result['micro_batch']} rows a pass, {layers}, "
        f"{result['peak_gpu_gib']} GiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("pairs", nargs="+", metavar="RECIPE=PRESET", help="of 8B, by QLoRA or LoRA")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/found"), help="for checkpoints and runs: 25 GB")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    results = Results(options.output, options.seconds, about(options.commit))
    plans = [plan for pair in options.pairs for plan in runs_of(pair, options.work)]
    prepare(options, {Path(plan["checkpoint"]).name for plan in plans})
    run_alone([Task(name_of(plan), SECONDS, lambda plan=plan: run_tier(plan, options.work)) for plan in plans], results)
    for name in map(name_of, plans):
        print(in_one_line(name, results.found.get(name, {})))


if __name__ == "__main__":
    main()
