"""How long a row may be on a card: trains three steps of one row that is a single example, through `cli.py train`.

    python benchmarks/longest_rows.py OUTPUT --models FOLDER --tokenizer FOLDER --seconds 500 [--only WORD ...]

Each run has a GPU of its own; as many run side by side as there are GPUs. `--models` holds checkpoints of
`benchmarks/random_checkpoint.py`, by name; they are taken to have Llama 3.1's positions, or as many as a row needs.
LoRA has r 32 on all linears, all layers are recomputed, and what they keep goes to host RAM: inputs, and attention's
results where `--host-memory-gib` has room for them. By `plan` 8B's longest row takes 177 GiB with them and 90 without,
70B's 230 and 115. Writes OUTPUT/longest-rows.json.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from tier_run import ROOT, about, torch_gib, visible_gpus
from whole_rows import prepared

LLAMA_3_1_POSITIONS = 131_072
RUNS = [
    {"model": "8b-nf4", "card_gib": 80, "tokens": 344_064, "claimed": 343_000},
    {"model": "70b-nf4", "card_gib": 80, "tokens": 90_112, "claimed": 90_000, "embedding_offload": "false"},
    {"model": "8b-nf4", "card_gib": 24, "tokens": 98_304, "claimed": 79_000},
    {"model": "70b-nf4", "card_gib": 48, "tokens": 24_576, "claimed": 12_000},
    {"model": "8b-nf4", "card_gib": 12, "tokens": 49_152, "claimed": 22_000, "embedding_offload": "true"},
    {"model": "8b-nf4", "card_gib": 8, "tokens": 10_240, "claimed": 3_000, "embedding_offload": "true"},
]
"""`claimed`: the longest row that Unsloth's documents name for such a card."""
PROFILES = {"8b-nf4": ("llama3_8b_qlora", "single_gpu"), "70b-nf4": ("llama3_70b_qlora", "fsdp_1x48gb")}
STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--host-memory-gib", type=float, default=256, help="For each run.")
    parser.add_argument("--only", nargs="*", help="Runs whose name has one of these words.")
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    import transformers  # noqa: F401  (here, since threads that import it at once get in each other's way)

    options.output.mkdir(parents=True, exist_ok=True)
    chosen = [run for run in RUNS if not options.only or any(word in _name(run) for word in options.only)]
    report = about(options.commit) | {"command": " ".join(sys.argv), "runs": []}
    waiting, deadline = queue.Queue(), time.monotonic() + options.seconds
    for run in chosen:
        with_long_positions(options.models / run["model"], run["tokens"])  # made here, not by several threads at once
        waiting.put(run)

    file, saving = options.output / "longest-rows.json", threading.Lock()

    def serve(gpu: str) -> None:
        with suppress(queue.Empty):
            while True:
                report["runs"].append(_measure(waiting.get_nowait(), gpu, options, deadline))
                with saving:
                    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    threads = [threading.Thread(target=serve, args=(gpu,)) for gpu in visible_gpus()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for run in report["runs"]:
        print({key: value for key, value in run.items() if key != "set"})


def _name(run: dict) -> str:
    return f"{run['model']}-{run['card_gib']}gb"


def _measure(run: dict, gpu: str, options, deadline: float) -> dict:
    model = with_long_positions(options.models / run["model"], run["tokens"])
    data = prepared(run["tokens"], STEPS + 1, options.output, options.tokenizer)
    recipe, profile = PROFILES[run["model"]]
    sets = {
        "base.model": model, "data.prepared": data, "data.chat_template": "plain", "data.system_message": "null",
        "max_length": run["tokens"],
        "global_batch_size": 1, "lora.r": 32, "profile.micro_batch": 1, "profile.kept_layers": 0,
        "profile.activation_offload": "true", "profile.gpu_memory_gib": run["card_gib"],
        "profile.host_memory_gib": options.host_memory_gib,
        "training.max_steps": STEPS, "training.logging_steps": 1,
        "training.save_strategy": "'no'", "training.report_to": "none",
    }  # fmt: skip
    if "embedding_offload" in run:
        sets["profile.embedding_offload"] = run["embedding_offload"]
    flags = [str(part) for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    planned = json.loads(_call(["plan", recipe, "--profile", profile, *flags, "--json"], {}, 60).stdout)
    about_plan = {"planned_gpu_gib": planned["peak_gpu_gib"], "longest_planned": planned["longest_sequence"]}
    about_plan |= {"kept_attention": planned["kept_attention"]}
    folder = options.output / _name(run)
    environment = {
        "CUDA_VISIBLE_DEVICES": gpu,
        "FITUNE_GPU_CAP_GIB": str(torch_gib(run["card_gib"])),
    }
    try:
        train = ["train", recipe, "--profile", profile, "--output", folder, *flags]
        done = _call(train, environment, deadline - time.monotonic())
        measured = json.loads((folder / "measurements.json").read_text(encoding="utf-8"))
    except subprocess.TimeoutExpired:
        return run | about_plan | {"error": "no time was left"}
    except (OSError, ValueError):
        return run | about_plan | {"error": (done.stderr or done.stdout)[-1500:]}
    keys = ("step_seconds", "step_tokens", "peak_allocated_gib", "peak_reserved_gib", "tokens_per_second_per_gpu")
    return run | about_plan | {key: measured[key] for key in keys} | {"set": {k: str(v) for k, v in sets.items()}}


def _call(arguments: list, environment: dict, seconds: float) -> subprocess.CompletedProcess:
    command = [sys.executable, "cli.py", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=seconds, check=False
    )


def with_long_positions(model: Path, tokens: int) -> Path:
    """The checkpoint under another name, its files linked, with positions for `tokens`, at least Llama 3.1's."""
    positions = max(LLAMA_3_1_POSITIONS, tokens)
    longer = model.with_name(f"{model.name}-{positions}")
    if not (longer / "config.json").exists():
        longer.mkdir(exist_ok=True)
        for file in model.iterdir():
            if file.name != "config.json" and not (longer / file.name).exists():
                (longer / file.name).symlink_to(file.absolute())
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        text = json.dumps(config | {"max_position_embeddings": positions})
        (longer / "config.json").write_text(text, encoding="utf-8")
    return longer


if __name__ == "__main__":
    main()
