"""Writes what the tiers measured, benchmarks/results/*.json, where it is published.

The tables in README.md, docs/speed.md and docs/memory.md, between their marks, and `expected:` at the end of each
memory profile.

python benchmarks/tables.py [--check]
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.full_results import had_another_layer, optimizer_table
from benchmarks.peer_tables import beside_table, fast_line, peers_table
from fitune.config import run as runs
from fitune.config.model_shapes import ModelShape, find_shape
from fitune.config.schema import Run
from fitune.config.shipped import PROFILES
from fitune.planning.fill import filled, resolve
from fitune.planning.gpu_models import gpu_model
from fitune.planning.limits import limits_of
from fitune.planning.memory import gpu_peak, host_peak
from fitune.planning.plan import setup_of
from fitune.planning.sizes import GIB

ROOT = Path(__file__).resolve().parents[1]
README, SPEED, MEMORY = ROOT / "README.md", ROOT / "docs" / "speed.md", ROOT / "docs" / "memory.md"
FP8, FP8_SUMS = ROOT / "docs" / "fp8.md", ROOT / "benchmarks" / "results" / "fp8-sums-h200-2026-11-29.json"
FAKE = ROOT / "benchmarks" / "fake_memory.json"
CARDS = {
    "one 8 GB card": (8, {"8B": ("llama3_8b_qlora", "single_gpu_8gb")}),
    "one 12 GB card": (12, {"70B": ("llama3_70b_qlora", "fsdp_offload_1x12gb")}),
    "one 24 GB card": (
        24,
        {"8B": ("llama3_8b_qlora", "single_gpu"), "70B": ("llama3_70b_qlora", "fsdp_offload_1x24gb")},
    ),
    "two 24 GB cards": (24, {"70B": ("llama3_70b_qlora", "fsdp_offload_2x24gb")}),
    "four 24 GB cards": (24, {"70B": ("llama3_70b_qlora", "fsdp_4x24gb")}),
    "one 48 GB card": (48, {"70B": ("llama3_70b_qlora", "fsdp_1x48gb")}),
}
"Cards that people own, with the memory of one and the tier that trains each model by QLoRA there."
TIERS_OF_2024 = {
    ("llama3_70b_qlora", "fsdp_offload_4gpu"): "22 GB, 127 GB",
    ("llama3_70b_qlora", "fsdp_2x40gb"): "about 2x40 GB",
    ("llama3_70b_lora", "fsdp_lora_8x80gb"): "about 8x80 GB",
    ("llama3_70b_full", "fsdp_full_16x80gb"): "about 16x80 GB",
}
"What the 2024 tutorial reported for its tiers: per GPU and host RAM where it measured them."


def measured_tiers() -> list[dict]:
    """Every run of a tier in benchmarks/results/ that ended well, the newest last.

    A file holds one result, a list, or as tiers.py writes them results by name.
    """
    found = []
    for file in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        found += data if isinstance(data, list) else [data, *data.values()]
    runs_of_tiers = [entry for entry in found if isinstance(entry, dict) and entry.get("profile") and entry.get("ok")]
    return sorted(map(_with_kept_layers, runs_of_tiers), key=lambda run: run["date"])


def _with_kept_layers(entry: dict) -> dict:
    """A run before 27 November had all its layers recomputed or none, and an adapter's had not the layer of today.

    Nor had those of method full two days more.
    """
    if "kept_layers" in entry:
        return entry | {"earlier_layer": entry["method"] == "full" and had_another_layer(entry)}
    kept = 0 if entry["activation_checkpointing"] else entry["layers"]
    entry = entry | {"kept_layers": kept}
    return entry | {"earlier_layer": entry["method"] != "full" or had_another_layer(entry)}


def whole_shape(entry: dict) -> ModelShape:
    """The shape of the run's model with all its layers."""
    return find_shape(resolve(entry["recipe"], entry["profile"]).recipe.base.model)


def is_whole(entry: dict) -> bool:
    return entry["layers"] == whole_shape(entry).layers


def is_as_profiled(entry: dict) -> bool:
    """Whether a run had its profile's settings: of a sweep's runs the winner, if it had the recipe's batch as well.

    Other labels say what is different.
    """
    run = as_profiled_now(entry)
    settings = ("micro_batch", "kept_layers", "activation_offload")
    same = all(entry[name] == getattr(run.profile, name) for name in settings)
    same = same and entry.get("replicas", 1) == run.replicas
    same_batch = entry["gradient_accumulation_steps"] == run.gradient_accumulation_steps
    return same and ("label" not in entry or (entry["label"].startswith("sweep") and same_batch))


def as_profiled_now(entry: dict) -> Run:
    """What the profile would be today on the GPU of a measured run: `plan` chooses by its speed."""
    run = runs.resolve(entry["recipe"], entry["profile"])
    return filled(run, limits_of(run), gpu_model(entry["gpu_name"]))


def newest_tiers() -> list[dict]:
    """The last measurement of each whole model on each tier as its profile is now, by recipe and memory."""
    as_profiled = [run for run in measured_tiers() if is_whole(run) and is_as_profiled(run)]
    as_profiled.sort(key=lambda run: (run["date"], "label" not in run))
    return sorted(_last_of_each_tier(as_profiled).values(), key=lambda run: (run["recipe"], run["peak_gpu_gib"]))


def shown_tiers() -> list[dict]:
    """`newest_tiers`; a tier measured only before its profile was changed has the last run of then."""
    before = [run for run in measured_tiers() if is_whole(run) and "label" not in run]
    shown = _last_of_each_tier([*before, *newest_tiers()])
    return sorted(shown.values(), key=lambda run: (run["recipe"], run["peak_gpu_gib"]))


def _last_of_each_tier(measured: list[dict]) -> dict[tuple[str, str], dict]:
    return {(run["recipe"], run["profile"]): run for run in measured}


def tier_table() -> str:
    shown = shown_tiers()
    lines = [
        "| recipe | profile | GPUs | micro batch | layers kept | GiB per GPU, all of it | host GiB, machine "
        "| tokens/s per GPU | load, s | 2024 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in shown:
        cells = [
            f"`{run['recipe']}`", f"`{run['profile']}`", run["num_gpus"], *_settings(run),
            f"{run['peak_gpu_gib']:.1f}", f"{run['peak_host_gib']:.1f}", _speed(run), f"{run['load_seconds']:.0f}",
            TIERS_OF_2024.get((run["recipe"], run["profile"]), ""),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    dates: dict[str, set[str]] = {}
    for run in shown:
        dates.setdefault(f"{run['gpu_name']}, torch {run['versions']['torch']}", set()).add(run["date"])
    about = "; ".join(f"{machine}, {' and '.join(sorted(days))}" for machine, days in sorted(dates.items()))
    notes = [f"Measured on {about}: every rank a real process held to its card's share."]
    if any("(now" in line for line in lines):
        notes.append("`now`: the profile was changed since; `plan` says what it takes.")
    return "\n".join([*lines, "", *notes])


def card_table() -> str:
    """What README shows of the tiers: cards that people own."""
    lines = [
        "| you have | 8B QLoRA: GiB per GPU | tokens/s | 70B QLoRA: GiB per GPU | GiB of RAM | tokens/s per GPU |",
        "|---|---|---|---|---|---|",
    ]
    shown = _last_of_each_tier(shown_tiers())
    for cards, (_, tiers) in CARDS.items():
        small, large = (shown.get(tiers.get(model)) for model in ("8B", "70B"))
        cells = [f"{small['peak_gpu_gib']:.1f}", _speed(small)] if small else ["", ""]
        large_cells = (f"{large['peak_gpu_gib']:.1f}", f"{large['peak_host_gib']:.0f}", _speed(large)) if large else ()
        lines.append(f"| {' | '.join([cards, *cells, *(large_cells or ('', '', ''))])} |")
    return "\n".join(lines)


def _settings(entry: dict) -> list[str]:
    """Micro batch and kept layers of a run, and of its profile today where those differ."""
    now = as_profiled_now(entry).profile
    pairs = [(entry[key], getattr(now, key)) for key in ("micro_batch", "kept_layers")]
    return [f"{then}" + (f" (now {today})" if today != then else "") for then, today in pairs]


def _speed(entry: dict) -> str:
    """Of runs with a GPU for each rank and today's layer."""
    shared = entry.get("machine_gpus", 1) < entry["num_gpus"]
    return "" if shared or entry.get("earlier_layer") else f"{entry['tokens_per_second_per_gpu']:,.0f}"


def table_of_2024() -> str:
    """The tutorial's tiers: what they need now, measured or predicted."""
    measured, shown = _last_of_each_tier(newest_tiers()), _last_of_each_tier(shown_tiers())
    on_fake = {(entry["recipe"], entry["profile"]) for entry in json.loads(FAKE.read_text(encoding="utf-8"))}
    lines = ["| recipe | profile | 2024 | GiB per GPU | GiB of RAM per machine | |", "|---|---|---|---|---|---|"]
    for (recipe, profile), before in TIERS_OF_2024.items():
        if run := measured.get((recipe, profile)):
            gpu, host, source = run["peak_gpu_gib"], run["peak_host_gib"], "measured"
        else:
            setup = setup_of(
                run := resolve(recipe, profile, ("profile.async_save=false",)), find_shape(run.recipe.base.model)
            )
            gpu, host = gpu_peak(setup).total / GIB, host_peak(setup) / GIB
            source = "plan, and fake tensors" if (recipe, profile) in on_fake else "plan"
            if then := shown.get((recipe, profile)):
                source += f"; {then['peak_gpu_gib']:.1f} measured with {then['kept_layers']} layers kept"
        lines.append(f"| `{recipe}` | `{profile}` | {before} | {gpu:.1f} | {host:.1f} | {source} |")
    return "\n".join(lines)


def sweep_table() -> str:
    """Micro batches of a tier, measured one after the other."""
    lines = [
        "| recipe | profile | micro batch | checkpointed | GiB per GPU | tokens/s per GPU | of micro batch 1's |",
        "|---|---|---|---|---|---|---|",
    ]
    sweeps = [run for run in measured_tiers() if run.get("label", "").startswith("sweep")]

    def session(run: dict) -> tuple:
        return tuple(run[key] for key in ("recipe", "profile", "gpu_name", "commit", "date"))

    one_row = {
        session(run): run["tokens_per_second_per_gpu"]
        for run in sweeps
        if run["micro_batch"] == 1 and not run["kept_layers"]
    }
    for run in sweeps:
        speed, first = run["tokens_per_second_per_gpu"], one_row.get(session(run))
        lines.append(
            f"| `{run['recipe']}` | `{run['profile']}` | {run['micro_batch']} "
            f"| {'no' if run['kept_layers'] else 'yes'} | {run['peak_gpu_gib']:.1f} | {speed:,.0f} "
            f"| {f'{speed / first:.0%}' if first else ''} |"
        )
    return "\n".join(lines)


def fp8_sums_table() -> str:
    """What weights' gradients lose to how a GPU adds up their products in fp8."""
    columns = ("fast_error", "float32_error", "rounding_error", "bf16_error")
    lines = ["| tokens | mean | fewer bits | float32 | rounding | bf16 |", "|---|---|---|---|---|---|"]
    for entry in json.loads(FP8_SUMS.read_text(encoding="utf-8"))["errors"]:
        errors = (f"{entry[column]:.1%}" for column in columns)
        lines.append(f"| {entry['tokens']:,} | {entry['mean']} | {' | '.join(errors)} |")
    return "\n".join(lines)


def with_table(text: str, name: str, table: str) -> str:
    """`text` with what stands between `<!-- NAME -->` and `<!-- /NAME -->` replaced."""
    head, rest = text.split(f"<!-- {name} -->")
    _, tail = rest.split(f"<!-- /{name} -->")
    return f"{head}<!-- {name} -->\n{table}\n<!-- /{name} -->{tail}"


def with_expected(text: str, measured: list[dict]) -> str:
    """A memory profile's text with `expected:`, its last key, as measured."""
    head, _, old = text.partition("expected:\n")
    assert all(line.startswith("  ") for line in old.splitlines()), "expected: is not the last key"
    lines = [
        f"  {run['recipe']}: {{peak_gpu_gib: {run['peak_gpu_gib']}, peak_host_gib: {run['peak_host_gib']}, "
        f"source: measured {run['date']} {run['commit']}}}\n"
        for run in sorted(measured, key=lambda run: run["recipe"])
    ]
    return "".join([head, *(["expected:\n"] if lines else []), *lines])


def published() -> dict[Path, str]:
    """Each page and profile as it should be."""
    memory = with_table(MEMORY.read_text(encoding="utf-8"), "2024", table_of_2024())
    memory = with_table(memory, "optimizer states", optimizer_table())
    readme = with_table(README.read_text(encoding="utf-8"), "fast", fast_line())
    texts = {
        README: with_table(with_table(readme, "cards", card_table()), "beside", beside_table()),
        SPEED: with_table(with_table(SPEED.read_text(encoding="utf-8"), "tiers", tier_table()), "peers", peers_table()),
        MEMORY: with_table(memory, "micro batches", sweep_table()),
        FP8: with_table(FP8.read_text(encoding="utf-8"), "fp8 sums", fp8_sums_table()),
    }
    newest = newest_tiers()
    for file in sorted(PROFILES.glob("*.yaml")):
        measured = [run for run in newest if run["profile"] == file.stem]
        texts[file] = with_expected(file.read_text(encoding="utf-8"), measured)
    return texts


def main() -> None:
    for file, text in published().items():
        if "--check" not in sys.argv:
            file.write_text(text, encoding="utf-8")
        elif file.read_text(encoding="utf-8") != text:
            sys.exit(f"{file} is out of date: run make bench")


if __name__ == "__main__":
    main()
