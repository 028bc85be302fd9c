"""Writes benchmarks/README.md: what `plan` predicts for every measured run, and how far off it is.

python benchmarks/accuracy.py [--check]
"""

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.full_results import full_table, gpu_of
from benchmarks.optimizer_of_then import with_its_optimizer
from benchmarks.tables import FAKE, is_whole, measured_tiers, whole_shape
from fitune.config.model_shapes import find_shape
from fitune.config.run import with_resharding
from fitune.planning.fill import resolve
from fitune.planning.gpu_models import gpu_model
from fitune.planning.memory import MEASURED, gpu_moments, gpu_peak, host_peak
from fitune.planning.plan import setup_of
from fitune.planning.sizes import GIB, Setup
from fitune.planning.step_time import step_seconds
from fitune.planning.words import KEEPS_GATHERED

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "benchmarks" / "README.md"


def measured_runs() -> list[dict]:
    """The measured tiers, but for those of code that took more memory."""
    return [entry for entry in _of_todays_layer() if "superseded" not in entry and is_whole(entry)]


def _of_todays_layer() -> list[dict]:
    return [entry for entry in measured_tiers() if not entry.get("earlier_layer")]


def timed_runs() -> list[dict]:
    """The runs that had a GPU for each rank, but for those that say why code of then launched more slowly.

    Those that don't say of how many GPUs: two H100s or one H200.
    """
    return [
        entry for entry in measured_runs()
        if entry["num_gpus"] <= entry.get("machine_gpus", 2 if "H100" in entry["gpu_name"] else 1)
        and "launched_slower" not in entry
    ]  # fmt: skip


def runs_of_fewer_layers() -> list[dict]:
    """Tiers too large to be measured: at full width, with as many layers as fit."""
    return sorted(
        (entry for entry in _of_todays_layer() if not is_whole(entry)),
        key=lambda entry: (entry["recipe"], entry["layers"]),
    )


def setup_of_measured(entry: dict) -> Setup:
    """The run as its command line described it then, but for the checkpoint's and the data's folders."""
    sets = [value for flag, value in pairwise(entry["command"].split()) if flag == "--set"]
    others = ("base.model=", "data.prepared=", "training.save_")  # nothing that the plan depends on
    sets = [item for item in sets if not item.startswith(others)]
    as_measured = ("micro_batch", "kept_layers", "activation_offload")  # the profile may have changed
    sets += [f"profile.{key}={entry[key]}" for key in as_measured]
    sets.append(f"profile.async_save={entry.get('async_save', False)}")  # the first runs knew no copies
    sets.append(f"profile.replicas={entry.get('replicas', 1)}")  # nor these
    sets.append(f"profile.reduce_dtype={entry.get('reduce_dtype', 'fp32')}")
    sets.append(f"profile.kept_attention={entry.get('kept_attention', False)}")
    run = resolve(entry["recipe"], entry["profile"], tuple(sets))
    run = with_resharding(run, entry.get("reshard_after_forward", True))  # what `plan` did not choose at first
    setup = setup_of(run, replace(find_shape(run.recipe.base.model), layers=entry["layers"]))
    return with_its_optimizer(setup, entry)


def gpu_needs_gib(entry: dict) -> float:
    """What tensors and CUDA took at the peak: a card may have as little. What the allocator kept beyond it was free."""
    return entry["peak_allocated_gib"] + entry["outside_allocator_gib"]


def gpu_error(entry: dict) -> float:
    """How far the prediction lies outside of what was needed and what was kept; 0 between them."""
    predicted = gpu_peak(setup_of_measured(entry)).total / GIB
    nearest = min(max(predicted, gpu_needs_gib(entry)), entry["peak_gpu_gib"])
    return predicted / nearest - 1


def measured_step_seconds(entry: dict) -> float:
    """Of an optimizer step, saves left out."""
    tokens = entry["micro_batch"] * entry["gradient_accumulation_steps"] * entry["max_length"]
    return tokens / entry["tokens_per_second_per_gpu"]


def predicted_step_seconds(entry: dict) -> float:
    return step_seconds(setup_of_measured(entry), gpu_model(entry["gpu_name"]))["total"]


def predicted_phases(entry: dict) -> dict[str, float]:
    """GiB by phase for a result of fake_memory.py, without the library workspaces that fake tensors know nothing of."""
    sets = [f"profile.{key}={entry[key]}" for key in ("micro_batch", "kept_layers", "compute", "reduce_dtype")]
    run = resolve(entry["recipe"], entry["profile"], (*sets, "profile.replicas=1", *entry["sets"]))
    run = with_resharding(run, entry["reshard_after_forward"])
    setup = setup_of(run, find_shape(run.recipe.base.model))
    setup = replace(setup, shape=replace(setup.shape, layers=entry["layers"]), accumulation=1)
    assert (setup.tokens, setup.ranks) == (entry["tokens"], entry["ranks"])
    moments = gpu_moments(setup)
    return {phase: (sum(parts.values()) - MEASURED.cublas_workspace) / GIB for phase, parts in moments.items()}


def page() -> str:
    parts = [
        "# Does `plan` tell the truth?",
        "Written by `python benchmarks/accuracy.py`; the tests check the tables. Predictions come from "
        "[`fitune/planning/memory.py`](../fitune/planning/memory.py) and "
        "[`fitune/planning/step_time.py`](../fitune/planning/step_time.py).",
        "## Measured runs",
        "The run's own command, on one, two or four big GPUs whose ranks are each held to their tier's card "
        "(`benchmarks/tiers.py`). `needed` is what tensors and CUDA took, `kept` what the GPU showed: PyTorch's "
        "allocator also keeps memory that is free, up to the card's, and gives it back when it is short. The constants "
        "in `MEASURED` are from the runs of 24 November and before (host RAM of a process: from all), so the later "
        "rows are predictions, but for full fine-tuning's: those of 26 November showed that the moment of the "
        "embedding's gradient was missing and the second layer's too large.",
        _measured_table(),
        "## Seconds a step",
        "The runs that had a GPU for each rank: ranks that share one wait for each other. `plan`'s constants come "
        "from these very runs, from those of the next table and, for adapters, from the runs beside peers "
        "([docs/speed.md](../docs/speed.md)). So the table shows how far one formula fits them all, no more. The runs "
        "of one GPU beside peers are within 15 % too. Runs of adapters before 27 November had another layer and are "
        "left out, and so is that of the 8 GB card on 27 November, which waited for Python: launching takes less "
        "since. Runs of one row differ by 20 % among themselves. On other GPUs it is a guess. In these runs the CPU "
        "computed AdamW of weights in host RAM, and the predictions count it so. Today the GPU computes it, as in the "
        "runs of 70B from 12 GB beside peers; with method full no run has measured that.",
        _time_table(),
        "## Full fine-tuning on cards of given sizes",
        "`benchmarks/results/full-*.json`, 16 rows of 3072 a step unless the name says otherwise, most of them with "
        "small optimizer states; GiB in torch's allocator. The predictions are today's: what `plan` said before a run "
        "stands in its file. Seconds are the median of a run's fullest steps (one step where rows differ), beside "
        "those predicted for as many rows. The last columns are of the whole card, `needed` and `kept` as above. A "
        "star: something else worked on the machine or on that GPU (the file says what), so time and card are not "
        "held against `plan`.",
        full_table(),
        "## Fewer layers, extrapolated",
        "The full width of 70B with a few layers, on as many ranks as fit on two GPUs; GiB in torch's allocator. The "
        "last columns are what the whole model takes on as many GPUs: **extrapolated** in a straight line through the "
        "run and the one above, and predicted. Full fine-tuning with 2 layers peaks at another moment of a step than "
        "with more, so the first line is too low. Host RAM of these short runs is not held against `plan`: the ranks' "
        "peaks need not meet.",
        _fewer_layers_table(),
        "## Tiers that were not measured",
        "Two training steps of one rank on fake tensors, fitune's own model code and sharding under PyTorch's "
        "MemTracker (`benchmarks/fake_memory.py`): torch's allocator only, GiB.",
        _fake_table(),
    ]
    return "\n\n".join(parts) + "\n"


def _measured_table() -> str:
    lines = [
        "| recipe | profile | date | GPU GiB, predicted | needed | kept | off | host GiB, predicted | measured | off |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in measured_runs():
        setup = setup_of_measured(entry)
        gpu, host = gpu_peak(setup).total / GIB, host_peak(setup) / GIB
        host_off = host / entry["peak_host_gib"] - 1
        lines.append(
            f"| `{entry['recipe']}` | {_name(entry)} | {entry['date']} | {gpu:.1f} | {gpu_needs_gib(entry):.1f} "
            f"| {entry['peak_gpu_gib']:.1f} | {gpu_error(entry):+.1%} "
            f"| {host:.1f} | {entry['peak_host_gib']:.1f} | {host_off:+.1%} |"
        )
    return "\n".join(lines)


def _time_table() -> str:
    lines = [
        "| recipe | profile | date | GPU | micro batch | passes | predicted | measured | off |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in timed_runs():
        predicted, measured = predicted_step_seconds(entry), measured_step_seconds(entry)
        lines.append(
            f"| `{entry['recipe']}` | {_name(entry)} | {entry['date']} | {gpu_of(entry)} | {entry['micro_batch']} "
            f"| {entry['gradient_accumulation_steps']} | {predicted:.2f} | {measured:.2f} "
            f"| {predicted / measured - 1:+.0%} |"
        )
    return "\n".join(lines)


def _name(entry: dict) -> str:
    return ", ".join(filter(None, (f"`{entry['profile']}`", entry.get("label"))))


def _fewer_layers_table() -> str:
    lines = [
        "| recipe | GPUs | layers | measured | predicted | host GiB, predicted | measured | per layer "
        "| all layers, extrapolated | predicted |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    shown: dict[str, dict] = {}
    for entry in runs_of_fewer_layers():
        setup = setup_of_measured(entry)
        cells = [
            f"`{entry['recipe']}`", entry["num_gpus"], entry["layers"], f"{entry['peak_allocated_gib']:.2f}",
            f"{gpu_peak(setup).allocated / GIB:.2f}", f"{host_peak(setup) / GIB:.1f}", f"{entry['peak_host_gib']:.1f}",
        ]  # fmt: skip
        if before := shown.get(entry["recipe"]):
            rise = entry["peak_allocated_gib"] - before["peak_allocated_gib"]
            per_layer = rise / (entry["layers"] - before["layers"])
            whole = whole_shape(entry)
            extrapolated = entry["peak_allocated_gib"] + per_layer * (whole.layers - entry["layers"])
            predicted = gpu_peak(replace(setup, shape=whole)).allocated / GIB
            cells += [f"{per_layer:.2f}", f"{extrapolated:.1f}", f"{predicted:.1f}"]
        else:
            cells += [""] * 3
        shown[entry["recipe"]] = entry
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _fake_table() -> str:
    lines = ["| recipe | profile | phase | predicted | fake tensors | off |", "|---|---|---|---|---|---|"]
    for entry in json.loads(FAKE.read_text(encoding="utf-8")):
        profile = f"`{entry['profile']}`{', fp8' * (entry['compute'] == 'fp8')}"
        profile += f", {KEEPS_GATHERED}" * (not entry["reshard_after_forward"])
        for phase, predicted in predicted_phases(entry).items():
            if phase in entry["phases"]:
                found = entry["phases"][phase]
                lines.append(
                    f"| `{entry['recipe']}` | {profile} | {phase} | {predicted:.2f} | {found:.2f} "
                    f"| {predicted / found - 1:+.1%} |"
                )
    return "\n".join(lines)


def main() -> None:
    new = page()
    if "--check" in sys.argv:
        old = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
        sys.exit(0 if old == new else f"{PAGE} is out of date; run: python benchmarks/accuracy.py")
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
