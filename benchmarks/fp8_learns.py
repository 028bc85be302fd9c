"""Whether fp8 learns what bf16 learns: a model trained in both from the same data, both results judged in bf16.

    python benchmarks/fp8_learns.py OUTPUT --model FOLDER --dataset ROWS.jsonl [--steps 200] [--method lora]

Through fitune's own commands: prepare, train in bf16, in fp8 and in bf16 with another seed (how far two equally good
results lie apart), eval of each, which always computes in bf16. Then the gradients of the bf16 run's result on
held-out rows, in both. Writes OUTPUT/fp8-learns.json and prints tables for docs/fp8.md.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from learning_run import curve_and_held_out, fitune, folder_of, prepare_rows, shared_sets
from tier_run import ROOT, about

RUNS = {"bf16": ("bf16", 42), "fp8": ("fp8", 42), "bf16, other seed": ("bf16", 43)}
"Name -> (compute, seed)."
PROFILES = {"qlora": "single_gpu", "lora": "fsdp_1x48gb", "full": "single_gpu"}
LEARNING_RATES = {"qlora": 2e-4, "lora": 2e-4, "full": 1e-5}
ALLOWED = 0.005
"Of the held-out loss: what the two may lie apart."
EVERY = 20  # steps of the printed curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--method", choices=list(PROFILES), default="qlora")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, help=f"of methods, unless given: {LEARNING_RATES}")
    parser.add_argument("--template", default="chatml")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--gradients", nargs=2, metavar=("RUN", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.learning_rate = options.learning_rate or LEARNING_RATES[options.method]
    if options.gradients:
        _write_gradients(*map(Path, options.gradients))
    else:
        _measure(options)


def _measure(options) -> None:
    data = prepare_rows(options)
    report = about(options.commit) | {
        "command": " ".join(sys.argv), "model": options.model.name, "method": options.method, "steps": options.steps,
        "runs": _side_by_side(options, data),
    }  # fmt: skip
    losses = {name: run["held_out"]["tuned"]["loss"] for name, run in report["runs"].items()}
    report["held_out_difference"] = losses["fp8"] / losses["bf16"] - 1
    report["passed"] = abs(report["held_out_difference"]) <= ALLOWED
    report["gradients"] = _gradients(options)
    (options.output / "fp8-learns.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _print_tables(report)


def _side_by_side(options, data: Path) -> dict:
    """Losses are asked for, not speed: all runs at once."""
    with ThreadPoolExecutor(len(RUNS)) as pool:
        runs = {name: pool.submit(_run, name, *RUNS[name], options, data) for name in RUNS}
    return {name: run.result() for name, run in runs.items()}


def _run(name: str, compute: str, seed: int, options, data: Path) -> dict:
    """Training curve and held-out metrics of one run."""
    folder = folder_of(name, options.output)
    shutil.rmtree(folder, ignore_errors=True)
    sets = shared_sets(options, data, seed) | {"profile.compute": compute}
    recipe = "llama3_8b_full"
    if options.method != "full":
        recipe = "llama3_8b_qlora"
        sets |= {"method": options.method, "lora.trainable_tokens": "[]"}
    flags = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    fitune("train", recipe, "--profile", PROFILES[options.method], "--output", folder, "--force", *flags)
    return {"compute": compute, "seed": seed} | curve_and_held_out(folder)


def _gradients(options) -> dict:
    """How far fp8's gradients lie from bf16's, each trained weight's distance relative to its norm."""
    import torch

    bf16 = folder_of("bf16", options.output)
    files = [options.output.absolute() / f"gradients-{compute}.pt" for compute in ("bf16", "fp8")]
    for file in files:
        # both have the result of the bf16 run; the file's name says in what to multiply
        unused = ["--model", options.model, "--dataset", options.dataset]
        command = [sys.executable, __file__, options.output, *unused, "--gradients", bf16, file]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        subprocess.run(list(map(str, command)), cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": path})
    exact, rounded = (torch.load(file, weights_only=True) for file in files)
    apart = {name: ((rounded[name] - value).norm() / value.norm()).item() for name, value in exact.items()}
    worst = max(apart, key=apart.get)
    flat = [torch.cat([value.flatten() for value in found.values()]) for found in (exact, rounded)]
    cosine = torch.nn.functional.cosine_similarity(*flat, dim=0).item()
    ranked = sorted(apart.values())
    return {"largest": apart[worst], "of": worst, "median": ranked[len(ranked) // 2], "cosine_of_all": cosine}


def _write_gradients(folder: Path, file: Path) -> None:
    """The gradients of a run's result on the text of its first held-out rows, one process."""
    import torch

    from fitune.config import run as runs
    from fitune.config.hub import local_folder
    from fitune.data.dataset import load_tokenizer
    from fitune.training.distributed import compute_device, join
    from fitune.training.train import load_sharded_model
    from fitune.training.tuned import load_tuned_weights, tuned_base_folder

    run = runs.load(folder)
    alone = run.accelerate.model_copy(update={"num_processes": 1})
    run = run.model_copy(update={"accelerate": alone})
    mesh, base = join(run), tuned_base_folder(run, local_folder(run.recipe.base.model))
    tokenizer = load_tokenizer(run.recipe, base)
    model = load_sharded_model(run, base, tokenizer, mesh, fp8="fp8" in file.name)
    load_tuned_weights(run, model, mesh)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    device = compute_device(mesh)
    lines = (Path(run.recipe.data.prepared) / "test.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    for line in lines:
        text = "\n".join(message["content"] for message in json.loads(line)["messages"])
        ids = torch.tensor([tokenizer(text)["input_ids"][: run.recipe.max_length]], device=device)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}
    torch.save({name: gradient.float().cpu() for name, gradient in whole.items()}, file)


def _print_tables(report: dict) -> None:
    print("| | held-out loss | perplexity | token accuracy |\n|---|---|---|---|")
    held_out = {"before training": report["runs"]["bf16"]["held_out"]["base"]}
    held_out |= {name: run["held_out"]["tuned"] for name, run in report["runs"].items()}
    for name, found in held_out.items():
        print(f"| {name} | {found['loss']:.4f} | {found['perplexity']:.2f} | {found['token_accuracy']:.1%} |")
    print(f"\n| mean training loss of steps | {' | '.join(report['runs'])} |\n|---|{'---|' * len(report['runs'])}")
    for start in range(0, report["steps"], EVERY):
        curves = [run["curve"][start : start + EVERY] for run in report["runs"].values()]
        means = [sum(step["loss"] for step in curve) / len(curve) for curve in curves]
        print(f"| {start + 1} to {start + len(curves[0])} | {' | '.join(f'{mean:.4f}' for mean in means)} |")
    g = report["gradients"]
    print(
        f"\nfp8 against bf16: held-out loss {report['held_out_difference']:+.2%}, allowed {ALLOWED:.1%}; gradients "
        f"{g['median']:.3f} of their norm apart in the median, {g['largest']:.3f} at most ({g['of']}), cosine of all "
        f"{g['cosine_of_all']:.4f}"
    )


if __name__ == "__main__":
    main()
