"""Runs memory profiles on one or two big GPUs, with as many ranks as the tier has, each held to the tier's card.

    python benchmarks/tiers.py OUTPUT_FOLDER --tokenizer FOLDER [--only 'llama3_8b_qlora sweep' same-losses]

benchmarks/plan.json lists the runs: {"recipe", "profile", "label", "checkpoint", "cap_gib", "steps", "set", "resume",
"seconds"}. Each goes through `cli.py train`, alone on the machine: a few steps and a checkpoint. Then, side by side as
far as the GPUs' memory goes: the resumes, the same losses on other ranks, the tests that need a GPU. Last, alone, how
fast 70B loads. Checkpoints are random, of the true shape, and stay in the work folder. What ended well before
is not run again; with --seconds nothing begins that would not end in time ("seconds" of a run, on an H100).
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tier_run import ROOT, about, resume, run_tier

from fitune.planning.fill import resolve

SHOWN = (
    "ok", "seconds", "peak_allocated_gib", "peak_gpu_gib", "peak_host_gib", "load_seconds", "step_seconds",
    "tokens_per_second_per_gpu", "losses", "outcome", "before", "after", "error",
)  # fmt: skip
CONTEXTS_GIB = 6
"What is left free of each GPU for the CUDA contexts of a dozen processes."


@dataclass
class Task:
    """Something to run: `gib` of GPU memory on each of `gpus`."""

    name: str
    seconds: float
    run: Callable[[], dict]
    gib: float = 0
    gpus: tuple[int, ...] = ()
    resumes: str = ""
    "The task whose result gets this one's under `resumed`."


class Results:
    """OUTPUT/results.json: what each task found, by name; a resume's as part of its run's."""

    def __init__(self, folder: Path, seconds: float, origin: dict):
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.origin, self.end = folder / "results.json", origin, time.time() + seconds
        self.found = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.lock = threading.Lock()

    def is_due(self, task: Task) -> bool:
        found = self.found.get(task.resumes or task.name, {})
        if task.resumes:
            if not found.get("ok"):
                return False
            found = found.get("resumed", {})
        done, in_time = found.get("ok"), time.time() + task.seconds < self.end
        if not done and not in_time:
            print(f"{task.name}: no time for it", flush=True)
        return not done and in_time

    def run(self, task: Task) -> None:
        began = time.time()
        try:
            result = task.run()
        except Exception as error:
            result = {"ok": False, "error": repr(error)}
        with self.lock:
            if task.resumes:
                self.found[task.resumes]["resumed"] = result
            else:
                self.found[task.name] = {"seconds": round(time.time() - began, 1)} | result | self.origin
            self.file.write_text(json.dumps(self.found, indent=1) + "\n")
        shown = {key: result[key] for key in SHOWN if key in result}
        print(f"{task.name}: {shown}"[-3000:], flush=True)


def run_alone(tasks: list[Task], results: Results) -> None:
    for task in tasks:
        if results.is_due(task):
            results.run(task)


def run_side_by_side(tasks: list[Task], results: Results) -> None:
    """Each as soon as the memory it needs is free."""
    total = torch.cuda.get_device_properties(0).total_memory / 2**30 - CONTEXTS_GIB
    free = [total] * torch.cuda.device_count()
    tasks = [replace(task, gib=min(task.gib, total)) for task in tasks]
    changed = threading.Condition()
    waiting, threads = tasks, []

    def run(task: Task) -> None:
        results.run(task)
        with changed:
            for gpu in task.gpus:
                free[gpu] += task.gib
            changed.notify()

    with changed:
        while waiting:
            for task in list(waiting):
                if not results.is_due(task):
                    waiting.remove(task)
                elif all(free[gpu] >= task.gib for gpu in task.gpus):
                    waiting.remove(task)
                    for gpu in task.gpus:
                        free[gpu] -= task.gib
                    threads.append(threading.Thread(target=run, args=(task,)))
                    threads[-1].start()
            if waiting:
                changed.wait(5)
    for thread in threads:
        thread.join()


def name_of(plan: dict) -> str:
    return " ".join(filter(None, (plan["recipe"], plan["profile"], plan.get("label"))))


def choose(plans: list[dict], only: list[str], scripts: list[str]) -> list[dict]:
    """The runs that `only` names: one by its whole name, else all that have its words."""
    chosen, names = [], [name_of(plan) for plan in plans]
    for words in only:
        found = [words] if words in names else [name for name in names if set(words.split()) <= set(name.split())]
        if not found and words not in scripts:
            raise SystemExit(f"--only {words}: no run has these words, and the scripts are {', '.join(scripts)}")
        chosen += found
    return [plan for plan in plans if name_of(plan) in chosen]


def tier_tasks(plans: list[dict], work: Path) -> tuple[list[Task], list[Task]]:
    """The runs, and the resumes of those that saved."""
    every = tuple(range(torch.cuda.device_count()))
    trained, resumed = [], []
    for plan in plans:
        ranks = resolve(plan["recipe"], plan["profile"]).accelerate.num_processes
        gpus = every[:ranks]
        gib = plan["cap_gib"] * ranks / len(gpus)
        trained.append(Task(name_of(plan), plan["seconds"], lambda plan=plan: run_tier(plan, work), gib, gpus))
        if plan.get("resume"):
            limit = 2 * plan["seconds"] / 3
            name, run = f"{name_of(plan)} resumed", lambda plan=plan: resume(plan, work)
            resumed.append(Task(name, limit, run, gib, gpus, resumes=name_of(plan)))
    return trained, resumed


def script_tasks(options: argparse.Namespace) -> tuple[list[Task], Task]:
    """What scripts of their own measure: side by side with others, and alone."""
    every = tuple(range(torch.cuda.device_count()))
    work, losses, load = options.work, options.output / "same-losses.json", options.output / "load-70b.json"
    same_losses = [
        "benchmarks/same_losses.py", losses, "--commit", options.commit, "--recipe", "llama3_8b_qlora", "--reference",
        "single_gpu", "--compare", "fsdp_offload_1x24gb", "fsdp_4x24gb", "fsdp_offload_4gpu", "--cap-gib", 19, "--set",
        f"base.model={work / '8b-nf4'}", "--set", f"data.prepared={work / 'data'}", "--set", "max_length=1536",
    ]  # fmt: skip
    pytest = ["-m", "pytest", "-n", "3", "-q", "-p", "no:cacheprovider"]
    tests = [*pytest, "-rA", "-m", "gpu", "tests/gpu/test_gpu.py"]
    loading_tests = [*pytest, "tests/model/test_sharding.py", "tests/weights"]
    loading = [
        "benchmarks/load.py", work / "70b-nf4", load, "--commit", options.commit, "--recipe", "llama3_70b_qlora",
        "--profile", "fsdp_1x48gb",
    ]  # fmt: skip
    beside = [
        Task("same-losses", 400, lambda: script(same_losses), 56, every),
        Task("tests", 250, lambda: script(tests, CUDA_VISIBLE_DEVICES="0"), 40, every[:1]),
        Task("loading-tests", 150, lambda: script(loading_tests, CUDA_VISIBLE_DEVICES="")),
    ]
    return beside, Task("load", 60, lambda: script(loading))


def script(arguments: list, **environment: str) -> dict:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    told = done.stdout + (done.stderr if done.returncode else "")
    return {"ok": done.returncode == 0, "outcome": told[-6000:]}


def prepare(options: argparse.Namespace, checkpoints: set[str]) -> None:
    """Prepared data, and each checkpoint (SHAPE-FORMAT or SHAPE-FORMAT-LAYERS) on the next GPU."""
    data, tokenizer, started = options.work / "data", str(options.tokenizer), []
    if not (data / "report.json").exists():
        many = options.work / "rows.jsonl"
        write_many_rows(many)
        rows = ["--dataset", str(many), "--template", "plain", "--max-length", "3072"]
        command = [sys.executable, "cli.py", "prepare", *rows, "--tokenizer", tokenizer, "--output", str(data)]
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL))
    for number, name in enumerate(sorted(checkpoints, reverse=True)):
        shape, dtype, *layers = name.split("-")
        if not (options.work / name / "config.json").exists():
            command = [sys.executable, "benchmarks/random_checkpoint.py", str(options.work / name), "--shape", shape]
            command += ["--format", dtype, "--tokenizer", tokenizer, *(("--layers", *layers) if layers else ())]
            gpu = {"CUDA_VISIBLE_DEVICES": str(number % torch.cuda.device_count())}
            started.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | gpu))
    if any(process.wait() for process in started):
        raise SystemExit("a checkpoint or the data could not be made")


def write_many_rows(file: Path, copies: int = 8) -> None:
    """The shipped instructions, numbered: once, they are an epoch of a few steps, the last filled up."""
    shipped = (ROOT / "examples" / "instructions" / "instructions.jsonl").read_text(encoding="utf-8").splitlines()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as stream:
        for copy in range(copies):
            for row in map(json.loads, shipped):
                row["messages"][-1]["content"] += f" ({copy})"
                stream.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/tiers"), help="for checkpoints and runs: 120 GB")
    parser.add_argument("--only", nargs="+", metavar="WORDS", help="'RECIPE PROFILE LABEL', or some of it; scripts")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    results = Results(options.output, options.seconds, about(options.commit))
    # libraries without .pyc files take each process 20 s; a GPU without a process, seconds more
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ |= {"PYTHONPYCACHEPREFIX": str(options.work / "pyc"), "FITUNE_LLAMA3_TOKENIZER": str(options.tokenizer)}
    os.environ |= {"NCCL_SOCKET_NTHREADS": "4", "NCCL_NSOCKS_PERTHREAD": "4"}
    for gpu in range(torch.cuda.device_count()):
        torch.zeros(1, device=gpu)
    plans = json.loads((ROOT / "benchmarks" / "plan.json").read_text())
    plans = [plan | {"data": str(options.work / "data")} for plan in plans]
    beside, load = script_tasks(options)
    chosen = choose(plans, options.only, [task.name for task in (*beside, load)]) if options.only else plans
    checkpoints = {plan["checkpoint"] for plan in chosen}
    chosen = [plan | {"checkpoint": str(options.work / plan["checkpoint"])} for plan in chosen]
    scripts = [task for task in (*beside, load) if not options.only or task.name in options.only]
    checkpoints |= {"8b-nf4" for task in scripts if task.name == "same-losses"}
    checkpoints |= {"70b-nf4" for task in scripts if task is load}
    prepare(options, checkpoints)
    trained, resumed = tier_tasks(chosen, options.work)
    run_alone(trained, results)
    run_side_by_side([task for task in (*scripts, *resumed) if task is not load], results)
    run_alone([load] if load in scripts else [], results)


if __name__ == "__main__":
    main()
