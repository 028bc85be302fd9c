"""fitune beside its peers on the same work and the same kind of card, in one run: `benchmarks/peers.json` says what.

    python benchmarks/peers.py OUTPUT --models FOLDER --tokenizer FOLDER --seconds 500 [--only WORD …] [--unsloth SITE]

Each entry has a GPU of its own; as many run side by side as there are GPUs, entries of several GPUs alone at the end.
fitune runs through its own command, on rows that are one example each (`benchmarks/whole_rows.py`), as the peers' are;
a peer through `benchmarks/peer_run.py`. `--models` holds checkpoints of `benchmarks/random_checkpoint.py`, by name.
`--unsloth` is a folder of packages of its own, since Unsloth pins other versions. Writes OUTPUT/peers.json and prints a
table.
"""

import argparse
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))

from longest_rows import with_long_positions
from tier_run import ROOT, about, kill_all, visible_gpus
from whole_rows import prepared

USUAL = {"length": 3072, "rows_a_step": 8, "steps": 6}
"What an entry works on, where it does not say otherwise. The first step is not timed."
SETTLES_SECONDS = 2
MARGIN_GIB = 1.6
"Of a card's memory: what lies outside torch, and what the driver keeps."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="No entry starts that may end later.")
    parser.add_argument("--only", nargs="*", help="Entries whose name has one of these words.")
    parser.add_argument("--unsloth", help="Python path of Unsloth's packages.")
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    deadline, gpus = time.monotonic() + options.seconds, visible_gpus()
    entries = json.loads((ROOT / "benchmarks" / "peers.json").read_text(encoding="utf-8"))
    entries = [e for e in entries if not options.only or any(word in e["name"] for word in options.only)]
    options.output.mkdir(parents=True, exist_ok=True)
    entries = [USUAL | entry for entry in entries]
    rows: dict[int, int] = {}
    for entry in entries:
        _model(entry, options)  # made here, since threads that make one at once get in each other's way
        rows[entry["length"]] = max(rows.get(entry["length"], 0), entry["rows_a_step"] * entry["steps"])
    options.data = {length: prepared(length, rows[length], options.output, options.tokenizer) for length in rows}
    known = about(options.commit)
    report = {
        "date": known["date"], "commit": known["commit"], "command": " ".join(sys.argv),
        "hardware": f"{len(gpus)} x {known['gpu_name']}", "figures": "median step; GiB that torch allocated",
        "versions": known["versions"], "runs": [],
    }  # fmt: skip
    waiting = queue.Queue()
    for entry in entries:
        if entry.get("gpus", 1) == 1:
            waiting.put(entry)

    saving = threading.Lock()

    def serve(gpu: str) -> None:
        with suppress(queue.Empty):
            while True:
                report["runs"].append(_run(waiting.get_nowait(), options, gpu, deadline))
                with saving:
                    _save(report, options.output)

    threads = [threading.Thread(target=serve, args=(gpu,)) for gpu in gpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for entry in entries:
        if 1 < entry.get("gpus", 1) <= len(gpus):
            report["runs"].append(_run(entry, options, ",".join(gpus[: entry["gpus"]]), deadline))
            _save(report, options.output)
    for run in sorted(report["runs"], key=lambda run: run["work"]):
        print(f"{run['work']:34} {run['name']:44} {_words(run)}")


def _model(entry: dict, options) -> Path:
    model = options.models / entry["model"]
    return model if entry["length"] == USUAL["length"] else with_long_positions(model, entry["length"])


def _save(report: dict, folder: Path) -> None:
    (folder / "peers.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _words(run: dict) -> str:
    if "error" in run:
        return run["error"][-150:].replace("\n", " ")
    return f"{run['tokens_per_second']:8,.0f} tokens/s  {run['peak_allocated_gib']:5.1f} GiB"


def _run(entry: dict, options, gpus: str, deadline: float) -> dict:
    patience = min(entry.get("seconds", 100), deadline - time.monotonic())
    if patience < 30:
        return entry | {"error": "not started: no time was left"}
    command, environment, result, measured = (_fitune if entry["who"] == "fitune" else _peer)(entry, options)
    environment = os.environ | environment | {"CUDA_VISIBLE_DEVICES": gpus}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, text=True, **pipes)
    printed, complained = _until(measured, running, patience)
    try:
        return entry | result(printed)
    except (OSError, ValueError, IndexError):
        said = (complained or printed)[-1500:]
        was_killed = running.returncode == -signal.SIGKILL
        return entry | {"error": f"not done after {patience:.0f} s: {said}" if was_killed else said}


def _until(measured: Path | None, running: subprocess.Popen, patience: float) -> tuple[str, str]:
    """What it printed until it ended, had measured (writing a whole model takes its time), or was killed."""
    end = time.monotonic() + patience
    while time.monotonic() < end and not (measured and measured.exists()):
        with suppress(subprocess.TimeoutExpired):
            return running.communicate(timeout=1)
    time.sleep(SETTLES_SECONDS if time.monotonic() < end else 0)  # until the file is whole
    kill_all(running)
    return running.communicate()


def _fitune(entry: dict, options):
    folder = options.output / entry["name"].replace(" ", "-").replace(",", "")
    shutil.rmtree(folder, ignore_errors=True)  # what an earlier run measured there would be taken for this one's
    sets = {
        "base.model": _model(entry, options), "data.prepared": options.data[entry["length"]],
        "data.chat_template": "plain", "data.system_message": "null", "max_length": entry["length"],
        "global_batch_size": entry["rows_a_step"], "training.save_strategy": "'no'",
        "training.report_to": "none", "training.max_steps": entry["steps"], "training.logging_steps": 1,
        "training.disable_tqdm": "true", **entry.get("set", {}),
    }  # fmt: skip
    command = [sys.executable, "cli.py", "train", entry["recipe"], "--profile", entry["profile"], "--output", folder,
               "--force", *(part for key, value in sets.items() for part in ("--set", f"{key}={value}"))]  # fmt: skip

    def result(printed: str) -> dict:
        measured = json.loads((folder / "measurements.json").read_text(encoding="utf-8"))
        keys = (
            "step_seconds",
            "step_tokens",
            "peak_allocated_gib",
            "peak_reserved_gib",
            "load_seconds",
            "optimizer",
            "gradients",
        )
        run = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
        profile, found = run["profile"], {key: measured[key] for key in keys}
        found["reshard_after_forward"] = run["accelerate"]["reshard_after_forward"]
        found |= {key: profile[key] for key in ("micro_batch", "kept_layers", "kept_attention", "activation_offload")}
        shutil.rmtree(folder)  # a whole model, of some
        return found | {"tokens_per_second": round(measured["tokens_per_second_per_gpu"])}

    cap = {"FITUNE_GPU_CAP_GIB": str(entry["card_gib"] - MARGIN_GIB)} if "card_gib" in entry else {}
    return command, cap, result, folder / "measurements.json"


def _peer(entry: dict, options):
    gpus = entry.get("gpus", 1)
    launch = ["-m", "accelerate.commands.launch", "--config_file", "benchmarks/peer_fsdp2.yaml",
              "--num_processes", gpus, "--fsdp_activation_checkpointing", entry["recompute"] == "yes"]  # fmt: skip
    launch = launch if gpus > 1 else []
    command = [sys.executable, *launch, "benchmarks/peer_run.py", entry["who"], _model(entry, options),
               "--rows-a-pass", entry["rows"], "--recompute", entry["recompute"],
               "--rows", entry["rows_a_step"], "--length", entry["length"], "--steps", entry["steps"]]  # fmt: skip
    command += ["--method", entry["method"]] if "method" in entry else []
    command += ["--cap", entry["card_gib"] - MARGIN_GIB] if "card_gib" in entry else []
    path = {"PYTHONPATH": options.unsloth} if entry["who"] == "unsloth" and options.unsloth else {}
    return command, path, lambda printed: json.loads(printed.splitlines()[-1]), None


if __name__ == "__main__":
    main()
