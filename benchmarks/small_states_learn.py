"""Whether small optimizer states learn what float32 ones do: a model trained in full with both from the same data.

    python benchmarks/small_states_learn.py OUTPUT --model FOLDER --dataset ROWS.jsonl [--steps 300]

Through fitune's own prepare, training and eval: float32 states, the same with another seed (how far two equally good
models lie apart), bf16_8bit, and bf16_8bit that rounds weights to the nearest, to show why it does not. Writes
OUTPUT/small-states-learn.json, which benchmarks/learning_curves.py draws, and prints tables for docs/memory.md.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from learning_run import curve_and_held_out, folder_of, prepare_rows, shared_sets
from tier_run import ROOT, about

RUNS = {
    "float32": ("fp32", 42, []),
    "float32, other seed": ("fp32", 43, []),
    "bf16_8bit": ("bf16_8bit", 42, []),
    "bf16_8bit, to the nearest": ("bf16_8bit", 42, ["--nearest"]),
}
"Name -> (optimizer state, seed, flags of the training process)."
ALLOWED = 0.005
"Of the held-out loss: what the two may lie apart."
EVERY = 30  # steps of the printed curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--template", default="chatml")
    parser.add_argument("--profile", default="single_gpu")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--nearest", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        _train(options.output, nearest=options.nearest)
    else:
        _measure(options)


def _measure(options) -> None:
    data = prepare_rows(options)
    with ThreadPoolExecutor(len(RUNS)) as pool:  # losses are asked for, not speed
        runs = {name: pool.submit(_run, name, *RUNS[name], options, data) for name in RUNS}
    report = about(options.commit) | {
        "command": " ".join(sys.argv), "model": options.model.name, "method": "full", "steps": options.steps,
        "runs": {name: run.result() for name, run in runs.items()},
    }  # fmt: skip
    losses = {name: run["held_out"]["tuned"]["loss"] for name, run in report["runs"].items()}
    report["held_out_difference"] = {name: loss / losses["float32"] - 1 for name, loss in losses.items()}
    report["passed"] = abs(report["held_out_difference"]["bf16_8bit"]) <= ALLOWED
    text = json.dumps(report, indent=1) + "\n"
    (options.output / "small-states-learn.json").write_text(text, encoding="utf-8")
    _print_tables(report)


def _run(name: str, states: str, seed: int, flags: list[str], options, data: Path) -> dict:
    """Training curve and held-out metrics of one run."""
    from fitune.config import run as runs
    from fitune.planning.fill import resolve

    folder = folder_of(name, options.output)
    shutil.rmtree(folder, ignore_errors=True)
    sets = shared_sets(options, data, seed) | {"profile.optimizer_state": states}
    run = resolve(
        "llama3_8b_full", options.profile, tuple(f"{key}={value}" for key, value in sets.items()), str(folder)
    )
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(runs.dump(run), encoding="utf-8")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, folder, "--train", *flags]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": path})
    return (
        {"optimizer_state": states, "seed": seed}
        | curve_and_held_out(folder)
        | {"measurements": json.loads((folder / "measurements.json").read_text(encoding="utf-8"))}
    )


def _train(folder: Path, *, nearest: bool) -> None:
    """The training process of a run, which may round its weights to the nearest bf16 number."""
    from dataclasses import replace

    from fitune.optimizers.adamw_8bit import AdamW8bit
    from fitune.training.train import run_stage, train

    if nearest:
        drawn = AdamW8bit._step_of
        AdamW8bit._step_of = lambda *arguments: replace(drawn(*arguments), stochastic=False)
    run_stage(folder, train)


def _print_tables(report: dict) -> None:
    before = next(iter(report["runs"].values()))["held_out"]["base"]
    print(f"| | held-out loss | of float32's | token accuracy |\n|---|---|---|---|\n"
          f"| before training | {before['loss']:.4f} |  | {before['token_accuracy']:.1%} |")  # fmt: skip
    for name, run in report["runs"].items():
        found, apart = run["held_out"]["tuned"], report["held_out_difference"][name]
        print(f"| {name} | {found['loss']:.4f} | {apart:+.2%} | {found['token_accuracy']:.1%} |")
    print(f"\n| mean training loss of steps | {' | '.join(report['runs'])} |\n|---|{'---|' * len(report['runs'])}")
    for start in range(0, report["steps"], EVERY):
        curves = [run["curve"][start : start + EVERY] for run in report["runs"].values()]
        means = [sum(step["loss"] for step in curve) / len(curve) for curve in curves]
        print(f"| {start + 1} to {start + len(curves[0])} | {' | '.join(f'{mean:.4f}' for mean in means)} |")
    print(f"\nallowed between float32 and bf16_8bit: {ALLOWED:.1%}: {'passed' if report['passed'] else 'NOT passed'}")


if __name__ == "__main__":
    main()
