"""README's way, command by command, on a real small model: on this machine's GPUs, or without one on the CPU.

    python tests/e2e/run.py MODEL [--output FOLDER] [--only NAME …] [--commit HASH]

MODEL is a folder such as `tests/e2e/real_model.py` writes. Every combination of `combinations.py` goes through the real
commands (`parts.py`), several side by side; one that fails stops no other. Losses and answers are held against plain
transformers and PEFT in float32 (`reference.py`); no command may print a traceback or a library's warning. A table is
printed last, one JSON written to the folder; the exit code is 1 if anything failed. What was printed stays in --work.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from combinations import ON_CPU, ON_GPUS, Combination
from parts import ON_CPU as SIZE_ON_CPU
from parts import ON_GPU as SIZE_ON_GPU
from parts import TEMPLATE, Part, Size, set_up
from real_commands import Commands, Failed, environment
from reference import Reference
from tier_run import ROOT, about

MOST_GIB = 12
"Of a GPU, for each rank: many share one."


def main() -> None:
    options = _options()
    logging.disable_progress_bar()
    gpus = torch.cuda.device_count()
    size = SIZE_ON_GPU if gpus else SIZE_ON_CPU
    chosen = [c for c in (ON_GPUS if gpus else ON_CPU) if not options.only or c.name in options.only]
    began = time.monotonic()
    if not Path(torch.__cached__).exists():  # else each process would compile its imports
        os.environ.setdefault("PYTHONPYCACHEPREFIX", str(options.work / "pyc"))
    set_up_result = _set_up(options, size, gpus)
    results = {"set-up": set_up_result}
    if set_up_result["ok"]:
        bases = {"bf16": options.model}
        threads = max(1, os.cpu_count() // 4)
        reference = Reference(bases, options.work / "data" / "test.jsonl", TEMPLATE, threads)
        with ThreadPoolExecutor(options.workers or _workers(gpus)) as pool:
            parts = {
                c.name: pool.submit(_try_part, c, number, options, size, gpus, reference)
                for number, c in enumerate(chosen)
            }
        results |= {name: part.result() for name, part in parts.items()}
    seconds = round(time.monotonic() - began, 1)
    _write(options, results, seconds, gpus)
    _print_table(results, seconds)
    if not all(result["ok"] for result in results.values()):
        sys.exit(f"what was printed is in {options.work / 'logs'}")
    if options.remove:
        shutil.rmtree(options.work)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "e2e", help="folder of the JSON")
    parser.add_argument("--work", type=Path, help="for models, runs and logs, 20 GB [default: a temporary folder]")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=sorted({c.name for c in (*ON_GPUS, *ON_CPU)}))
    parser.add_argument("--workers", type=int, help="combinations side by side")
    parser.add_argument("--commit", help="[default: this checkout's]")
    options = parser.parse_args()
    if not (options.model / "config.json").is_file():
        parser.error(f"{options.model}: no model folder; python tests/e2e/real_model.py {options.model} makes one")
    options.model, options.remove = options.model.absolute(), options.work is None
    options.work = (options.work or Path(tempfile.mkdtemp(prefix="fitune-e2e-"))).absolute()
    for folder in ("logs", "runs", "merged"):
        (options.work / folder).mkdir(parents=True, exist_ok=True)
    return options


def _workers(gpus: int) -> int:
    """Combinations have up to four ranks, which mostly wait for the GPU."""
    return max(1, min(6, os.cpu_count() // 3)) if gpus else max(1, os.cpu_count() // 4)


def _set_up(options: argparse.Namespace, size: Size, gpus: int) -> dict:
    commands = Commands(options.work / "logs" / "set-up", environment(gpus, None, _cap(gpus)))
    return _tried(commands, lambda: set_up(commands, options.model, options.work, size))


def _try_part(combination: Combination, number: int, options, size: Size, gpus: int, reference: Reference) -> dict:
    own_gpu = number % gpus if gpus and combination.ranks == 1 else None
    commands = Commands(options.work / "logs" / combination.name, environment(gpus, own_gpu, _cap(gpus)))
    part = Part(combination, commands, size, options.work, options.model, on_gpu=bool(gpus))

    def go() -> dict:
        try:
            part.go(reference)
        finally:
            part.model = None
            shutil.rmtree(part.run / "checkpoints", ignore_errors=True)
        return {}

    result = _tried(commands, go) | {"compared": part.compared}
    said = result.get("printed", []) + result.get("error", "").splitlines()
    print(f"{'ok  ' if result['ok'] else 'FAIL'} {combination.name} {said[0] if said else ''}", flush=True)
    return result


def _tried(commands: Commands, do) -> dict:
    """What `do` found, the steps that were run, and why it failed if it did."""
    result = {"ok": True}
    try:
        result |= do()
    except Failed as error:
        result |= {"ok": False, "error": str(error)}
    except Exception:
        result |= {"ok": False, "error": traceback.format_exc()}
    if commands.printed_badly:
        result |= {"ok": False, "printed": commands.printed_badly}
    return result | {"steps": commands.steps}


def _cap(gpus: int) -> float | None:
    if not gpus:
        return None
    smallest = min(torch.cuda.get_device_properties(n).total_memory for n in range(gpus)) / 2**30
    return min(MOST_GIB, smallest / 2)


def _write(options: argparse.Namespace, results: dict, seconds: float, gpus: int) -> None:
    commit = options.commit or subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip() or "unknown"  # fmt: skip
    report = {
        "benchmark": "README's way on a real model",
        "ok": all(result["ok"] for result in results.values()),
        "seconds": seconds,
        "gpus": gpus,
        "cores": os.cpu_count(),
        "command": " ".join(["python", *sys.argv]),
        **about(commit),
        "parts": results,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / f"e2e-{f'{gpus}gpu' if gpus else 'cpu'}-{report['date']}.json"
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\n{file}")


def _print_table(results: dict, seconds: float) -> None:
    print(f"\n{'':20} {'s':>6}  {'base':>7} {'tuned':>7} {'float32':>8} {'bound':>7}")
    for name, result in results.items():
        taken = sum(step["seconds"] for step in result["steps"])
        losses = result.get("compared", {}).get("losses")
        numbers = ""
        if losses:
            tuned = losses["tuned"]
            numbers = (
                f"{losses['base']['found']:7.4f} {tuned['found']:7.4f} {tuned['float32']:8.4f} {tuned['bound']:7.4f}"
            )
        print(f"{name:20} {taken:6.0f}  {numbers:32}  {'ok' if result['ok'] else 'FAIL'}")
    for name, result in results.items():
        for said in [*result.get("printed", []), *([result["error"]] if "error" in result else [])]:
            print(f"\n{name}: {said}")
    print(f"\n{seconds:.0f} s in all")


if __name__ == "__main__":
    main()
