"""README's way, command by command, on a real small model: on this machine's GPUs, or without one on the CPU.

    python tests/e2e/run.py MODEL [--output FOLDER] [--only NAME …] [--ranks N …] [--commit HASH]

MODEL is a folder such as `tests/e2e/real_model.py` writes. Every combination of `combinations.py` goes through the real
commands (`parts.py`), several side by side, each on as many GPUs as it has ranks; where there are fewer, ranks share
them. One that fails stops no other. Losses and answers are held against plain transformers and PEFT in float32
(`reference.py`); no command may print a traceback or a library's warning. A table is printed last, one JSON written to
the folder; the exit code is 1 if anything failed. What was printed stays in --work.
"""

import argparse
import json
import os
import resource
import shutil
import signal
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
from parts import Part, set_up
from real_commands import Commands, Failed, environment
from reference import Reference
from tier_run import ROOT, about

MOST_GIB = 12
"Of a GPU, for each rank: many share one."


def main() -> None:
    options = _options()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, and for commands too, behind a shell's `&`
    logging.disable_progress_bar()
    if not Path(torch.__cached__).exists():  # else each process would compile its imports
        os.environ.setdefault("PYTHONPYCACHEPREFIX", str(options.work / "pyc"))
    results = {"set-up": _set_up(options)}
    if results["set-up"]["ok"]:
        threads = max(1, os.cpu_count() // 4)
        reference = Reference(options.model, options.work / "data" / "test.jsonl", threads)
        with ThreadPoolExecutor(options.workers) as pool:
            parts = {c.name: pool.submit(_try_part, c, options, reference) for c in options.chosen}
        results |= {name: part.result() for name, part in parts.items()}
    _write(options, results)
    _print_table(options, results)
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
    parser.add_argument("--ranks", nargs="+", type=int, metavar="N", help="only combinations of so many ranks")
    parser.add_argument("--workers", type=int, help="combinations side by side")
    parser.add_argument(
        "--seconds", type=float, default=3600, help="then whatever still runs is stopped [default: 3600]"
    )
    parser.add_argument("--commit", help="[default: this checkout's]")
    options = parser.parse_args()
    if not (options.model / "config.json").is_file():
        parser.error(f"{options.model}: no model folder; python tests/e2e/real_model.py {options.model} makes one")
    options.began, options.gpus = time.monotonic(), torch.cuda.device_count()
    options.ends = options.began + options.seconds
    options.chosen = [
        combination
        for combination in (ON_GPUS if options.gpus else ON_CPU)
        if (not options.only or combination.name in options.only)
        and (not options.ranks or combination.ranks in options.ranks)
    ]
    if not options.chosen:
        parser.error(
            f"no combination {'on GPUs' if options.gpus else 'on the CPU'} is called that or has so many ranks"
        )
    options.workers = options.workers or _workers(options.gpus)
    options.model, options.remove = options.model.absolute(), options.work is None
    options.work = (options.work or Path(tempfile.mkdtemp(prefix="fitune-e2e-"))).absolute()
    for folder in ("logs", "runs", "merged"):
        (options.work / folder).mkdir(parents=True, exist_ok=True)
    return options


def _workers(gpus: int) -> int:
    """On GPUs three cores for each combination, whose ranks mostly start up or wait; on the CPU one, which is busy."""
    return max(1, os.cpu_count() // 3) if gpus else os.cpu_count()


def _set_up(options: argparse.Namespace) -> dict:
    size = SIZE_ON_GPU if options.gpus else SIZE_ON_CPU
    commands = _commands(options, "set-up", list(range(options.gpus)))
    untied = any(combination.base == "untied" for combination in options.chosen)
    return _tried(commands, [lambda: set_up(commands, options.model, options.work, size, untied=untied)])


def _try_part(combination: Combination, options: argparse.Namespace, reference: Reference) -> dict:
    began = time.monotonic()
    commands = _commands(options, combination.name, _own_gpus(combination, options))
    size = SIZE_ON_GPU if options.gpus else SIZE_ON_CPU
    part = Part(combination, commands, size, options.work, options.model, on_gpu=bool(options.gpus))
    result = _tried(commands, part.stages(reference)) | {"compared": part.compared}
    shutil.rmtree(part.run / "checkpoints", ignore_errors=True)
    said = [*result.get("printed", []), *(error.splitlines()[0] for error in result.get("errors", []))]
    taken = f"{time.monotonic() - began:.0f} s"
    print(f"{'ok  ' if result['ok'] else 'FAIL'} {combination.name} {taken}", *said[:1], flush=True)
    return result


def _commands(options: argparse.Namespace, name: str, own_gpus: list[int]) -> Commands:
    return Commands(options.work / "logs" / name, environment(own_gpus, _cap(options.gpus)), options.ends)


def _own_gpus(combination: Combination, options: argparse.Namespace) -> list[int]:
    """As many as it has ranks, dealt out in turn; all if there are fewer, which its ranks share then."""
    before = sum(c.ranks for c in options.chosen[: options.chosen.index(combination)])
    return sorted({(before + rank) % options.gpus for rank in range(combination.ranks)}) if options.gpus else []


def _tried(commands: Commands, stages: list) -> dict:
    """What the stages found, the commands that were run, and why any failed. Without the first, no other is tried."""
    result, errors = {}, []
    for number, stage in enumerate(stages):
        try:
            result |= stage() or {}
        except Failed as error:
            errors.append(str(error))
        except Exception:
            errors.append(traceback.format_exc())
        if errors and number == 0:
            break
    result = {"ok": not errors and not commands.printed_badly} | result
    if errors:
        result["errors"] = errors
    if commands.printed_badly:
        result["printed"] = commands.printed_badly
    return result | {"steps": commands.steps}


def _cap(gpus: int) -> float | None:
    if not gpus:
        return None
    smallest = min(torch.cuda.get_device_properties(n).total_memory for n in range(gpus)) / 2**30
    return min(MOST_GIB, smallest / 2)


def _write(options: argparse.Namespace, results: dict) -> None:
    commit = options.commit or subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip() or "unknown"  # fmt: skip
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = {
        "benchmark": "README's way on a real model",
        "ok": all(result["ok"] for result in results.values()),
        "seconds": round(time.monotonic() - options.began, 1),
        "cpu_seconds_of_commands": round(children.ru_utime + children.ru_stime, 1),
        "gpus": options.gpus,
        "cores": os.cpu_count(),
        "command": " ".join(["python", *sys.argv]),
        **about(commit),
        "parts": results,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / f"e2e-{f'{options.gpus}gpu' if options.gpus else 'cpu'}-{report['date']}.json"
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\n{file}")


def _print_table(options: argparse.Namespace, results: dict) -> None:
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
        for said in [*result.get("printed", []), *result.get("errors", [])]:
            print(f"\n{name}: {said}")
    print(f"\n{time.monotonic() - options.began:.0f} s in all")


if __name__ == "__main__":
    main()
