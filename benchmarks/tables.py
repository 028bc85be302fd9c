"""Writes the tables in README.md from benchmarks/results/*.json, between their marks.

python benchmarks/tables.py [--check]
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fitune import run as runs
from fitune.model_shapes import find_shape

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
TIERS_OF_2024 = {"fsdp_offload_4gpu": "22 GB, 127 GB"}
"What the 2024 tutorial reported for its 4x24GB tier: per GPU, host RAM."


def measured_tiers() -> list[dict]:
    """Every run of a tier in benchmarks/results/ that ended well, newest file last.

    A file holds one result, a list, or as tiers.py writes them results by name.
    """
    found = []
    for file in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        found += data if isinstance(data, list) else [data, *data.values()]
    return [entry for entry in found if isinstance(entry, dict) and entry.get("profile") and entry.get("ok")]


def _all_layers(entry: dict) -> int:
    return find_shape(runs.resolve(entry["recipe"], entry["profile"]).recipe.base.model).layers


def tier_table() -> str:
    whole = [run for run in measured_tiers() if run["layers"] == _all_layers(run)]
    newest = {(run["recipe"], run["profile"]): run for run in whole}
    lines = [
        "| recipe | profile | GPUs | micro batch | GiB per GPU, all of it | host GiB, machine | load, s | 2024 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (recipe, profile), run in sorted(newest.items(), key=lambda item: (item[0][0], item[1]["peak_gpu_gib"])):
        cells = [
            f"`{recipe}`", f"`{profile}`", run["num_gpus"], run["micro_batch"], f"{run['peak_gpu_gib']:.1f}",
            f"{run['peak_host_gib']:.1f}", f"{run['load_seconds']:.0f}", TIERS_OF_2024.get(profile, ""),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    about = sorted({f"{run['gpu_name']}, torch {run['versions']['torch']}, {run['date']}" for run in newest.values()})
    return "\n".join(
        [*lines, "", f"Measured on {'; '.join(about)}: every rank a real process held to its card's share."]
    )


def with_table(text: str, name: str, table: str) -> str:
    """`text` with what stands between `<!-- NAME -->` and `<!-- /NAME -->` replaced."""
    head, rest = text.split(f"<!-- {name} -->")
    _, tail = rest.split(f"<!-- /{name} -->")
    return f"{head}<!-- {name} -->\n{table}\n<!-- /{name} -->{tail}"


def main() -> None:
    old = README.read_text(encoding="utf-8")
    new = with_table(old, "tiers", tier_table())
    if "--check" in sys.argv:
        sys.exit(0 if old == new else "README.md's tables are out of date: run make bench")
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
