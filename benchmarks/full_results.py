"""What benchmarks/results/full-*.json hold, as tables: full fine-tuning on cards of given sizes, beside `plan` today.

`benchmarks/full_runs.py` writes such files. `benchmarks/accuracy.py` and `benchmarks/tables.py` publish the tables.
"""

import json
from dataclasses import replace
from pathlib import Path
from statistics import median

from benchmarks.optimizer_of_then import with_its_optimizer
from fitune.config.model_shapes import find_shape
from fitune.config.tiles import MLP_TILE
from fitune.planning.fill import resolve
from fitune.planning.gpu_models import gpu_model
from fitune.planning.memory import gpu_peak
from fitune.planning.plan import setup_of
from fitune.planning.sizes import GIB, Setup
from fitune.planning.step_time import step_seconds

ROOT = Path(__file__).resolve().parents[1]
OWN_LAYER_FROM = "2026-11-29"
"Method full's runs: on that day and after it they have fitune's layers."
OPTIMIZERS = {"rmsprop": "RMSprop", "adagrad": "Adagrad", "sgd": "SGD"}
"By `training.optim`; AdamW's states are said by the profile's key."


def full_runs() -> list[dict]:
    """The runs of benchmarks/results/full-*.json that ended well: name, gpu_name, date, and what they took."""
    found = []
    for file in sorted((ROOT / "benchmarks" / "results").glob("full-*.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        head = {key: data[key] for key in ("gpu_name", "date")} | {"recipe": "llama3_8b_full"}
        found += [head | {"name": name} | run for name, run in data["runs"].items() if "error" not in run]
    return found


def had_another_layer(entry: dict) -> bool:
    """Whether method full had transformers' layers, and took more with them: what they keep, the MLP in one tile."""
    tokens = entry["micro_batch"] * entry.get("max_length", 3072)
    return entry["date"] < OWN_LAYER_FROM and (entry["kept_layers"] > 0 or tokens > MLP_TILE)


def setup_of_full_run(entry: dict) -> Setup:
    """The run with the rows and layers it had; its checkpoint may have fewer layers than the model."""
    sets = {"global_batch_size": 16, "training.save_strategy": "'no'"} | entry["set"]
    sets |= {"base.model": entry["model"]} if "model" in entry else {}
    sets |= {f"profile.{key}": entry[key] for key in ("micro_batch", "kept_layers")}
    sets |= {"profile.replicas": entry.get("replicas", 1)}
    sets |= {"profile.reduce_dtype": entry.get("reduce_dtype", "fp32")}
    sets |= {"profile.activation_offload": entry.get("activation_offload", False)}  # the first runs left it off
    run = resolve(entry["recipe"], entry["profile"], tuple(f"{key}={value}" for key, value in sets.items()))
    shape = find_shape(run.recipe.base.model)
    return with_its_optimizer(setup_of(run, replace(shape, layers=entry.get("layers", shape.layers))), entry)


def card_gib(entry: dict) -> tuple[float, float] | None:
    """What tensors and CUDA needed of the fullest GPU, and what it showed; None where that wasn't the run's alone.

    The allocator keeps free memory as long as the card has room: a card may have as little as what was needed.
    """
    if "peak_by_nvidia_smi_gib" not in entry or "disturbed" in entry:
        return None
    outside = entry["peak_by_nvidia_smi_gib"] - entry["peak_reserved_gib"]
    return entry["peak_allocated_gib"] + outside, entry["peak_by_nvidia_smi_gib"]


def gpu_of(entry: dict) -> str:
    return entry["gpu_name"].removeprefix("NVIDIA ").split()[0]


def full_table() -> str:
    lines = [
        "| run | date | GPUs | rows x passes | layers kept | GiB, predicted | measured | off | s a step, predicted "
        "| measured | off | card GiB, predicted | needed | kept |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in full_runs():
        if had_another_layer(entry):
            continue
        setup = setup_of_full_run(entry)
        memory, took = gpu_peak(setup).allocated / GIB, entry["peak_allocated_gib"]
        card = " | ".join(f"{size:.1f}" for size in card_gib(entry) or ()) or " | "
        rows, seconds = _fullest_steps(entry, setup.max_length)
        predicted = step_seconds(_with_rows(setup, rows), gpu_model(entry["gpu_name"]))["total"]
        lines.append(
            f"| {entry['name']}{' *' * ('disturbed' in entry)} | {entry['date']} | {setup.ranks} {gpu_of(entry)} "
            f"| {setup.micro_batch} x {setup.accumulation} | {setup.kept_layers} of {setup.shape.layers} "
            f"| {memory:.1f} | {took:.1f} | {memory / took - 1:+.1%} "
            f"| {predicted:.2f} | {seconds:.2f} | {predicted / seconds - 1:+.0%} "
            f"| {gpu_peak(setup).total / GIB:.1f} | {card} |"
        )
    return "\n".join(lines)


def _fullest_steps(entry: dict, length: int) -> tuple[int, float]:
    """How many rows of `length` the fullest steps had, and their median seconds: of one step where rows differ."""
    rows = [round(tokens / length) for tokens in entry["step_tokens"]]  # rounded: some have pads, which are computed
    pairs = zip(rows, entry["step_seconds"], strict=True)
    return max(rows), median(seconds for full, seconds in pairs if full == max(rows))


def _with_rows(setup: Setup, rows: int) -> Setup:
    """The run with so many rows in as many passes: short rows, which filled up its steps, take next to nothing."""
    return replace(setup, micro_batch=rows / setup.accumulation / setup.ranks)


def optimizer_table() -> str:
    """What each kind of optimizer state takes: the newest run of each model on one GPU that recomputes all layers.

    One that was disturbed counts where there is no other, and has no speed: that is not its alone.
    """
    newest = {}
    for entry in sorted(full_runs(), key=lambda entry: ("disturbed" not in entry, entry["date"])):
        setup = setup_of_full_run(entry)
        if setup.ranks == 1 and not (setup.kept_layers or setup.offload):
            newest[_model_of(entry), _states_of(entry)] = entry, setup
    lines = [
        "| model | optimizer states | bytes a parameter on the GPU | rows a pass | GiB that `plan` says | measured "
        "| tokens/s | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    by_size = sorted(newest.items(), key=lambda item: (item[1][1].shape.parameters, -item[1][0]["peak_allocated_gib"]))
    for (model, states), (entry, setup) in by_size:
        bytes_each = setup.trained + (0 if setup.optimizer_offload else setup.trained + setup.optimizer_state)
        lines.append(
            f"| {model} | {states} | {bytes_each:.4g} | {setup.micro_batch} | {gpu_peak(setup).allocated / GIB:.1f} "
            f"| {entry['peak_allocated_gib']:.1f} | {_speed(entry)} | {gpu_of(entry)}, {entry['date']} |"
        )
    return "\n".join(lines)


def _speed(entry: dict) -> str:
    return "disturbed" if "disturbed" in entry else f"{entry['median_tokens_per_second']:,}"


def _model_of(entry: dict) -> str:
    """8B unless the run says another."""
    return f"{find_shape(entry.get('model', 'meta-llama/Meta-Llama-3-8B')).parameters / 1e9:.0f}B"


def _states_of(entry: dict) -> str:
    sets = entry["set"]
    if optimizer := OPTIMIZERS.get(sets.get("training.optim")):
        return f"{optimizer}, float32"
    run = resolve(entry["recipe"], entry["profile"], tuple(f"{key}={value}" for key, value in sets.items()))
    in_ram = ", they and gradients in host RAM" if run.profile.optimizer_offload else ""
    return {"fp32": "AdamW, float32", "bf16_8bit": "AdamW, `bf16_8bit`"}[run.profile.optimizer_state] + in_ram
