"""Tables of fitune beside other programs, as benchmarks/peers.py measured them; benchmarks/tables.py publishes them."""

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
PEERS = {"trl": "TRL with Liger", "unsloth": "Unsloth"}
FIRST_WORK = "8B QLoRA, one 24 GB card"
"Of peers.py: what README's first lines say."


def newest_peers() -> list[dict]:
    """Each work's runs of benchmarks/peers.py, all of the newest report that has the work; `source` says which."""
    by_work = {}
    for file in sorted(RESULTS.glob("peers-*.json")):
        report = json.loads(file.read_text(encoding="utf-8"))
        what = f"{report['hardware']}, torch {report['versions']['torch']}, {report['date']}, {report['commit']}"
        source = f"{what} (`benchmarks/results/{file.name}`)"
        by_work |= {run["work"]: [] for run in report["runs"]}
        for run in report["runs"]:
            by_work[run["work"]].append(run | {"source": source})
    return [run for runs in by_work.values() for run in runs]


def fast_line() -> str:
    """README's first figures: fitune beside the others on the work that most people have the card for."""
    on_it = [run for run in newest_peers() if run["work"] == FIRST_WORK and "error" not in run]
    best = max(run["tokens_per_second"] for run in on_it if _is_bf16_of_fitune(run))
    others = [run for run in on_it if run["who"] != "fitune"]
    beside = " and ".join(f"{PEERS[run['who']]} {run['tokens_per_second']:,}" for run in others)
    return (
        f"It is fast where others fit too. 8B QLoRA, H200s held to 24 GB: **fitune {best:,} tokens/s**, {beside},\n"
        "on [the same work in the same run](#what-fits-and-how-fast)."
    )


def beside_table() -> str:
    """fitune's fastest run in bf16 beside each other program's, on the same work in the same run: of whole models."""
    finished = sorted((run for run in newest_peers() if "error" not in run), key=lambda run: run["tokens_per_second"])
    fastest = {(run["work"], run["who"]): run for run in finished}  # of each, the last
    lines = [
        "| same work, same run | rows a pass | tokens/s | GiB | fitune's rows a pass | tokens/s | GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    whole = [run for run in newest_peers() if run in fastest.values() and "layers" not in run]
    others = [run for run in whole if run["who"] != "fitune"]
    for other in others:
        ours = [run for run in finished if run["work"] == other["work"] and _is_bf16_of_fitune(run)]
        best = max(ours, key=lambda run: run["tokens_per_second"])
        cells = [
            f"{rows} | {run['tokens_per_second']:,} | {run['peak_allocated_gib']:.1f}"
            for run, rows in ((other, other["rows"]), (best, best["micro_batch"]))
        ]
        lines.append(f"| {other['work']}: {PEERS[other['who']]} | {' | '.join(cells)} |")
    sources = dict.fromkeys(run["source"] for run in others)
    return "\n".join([*lines, "", f"{'; '.join(sources)}."])


def _is_bf16_of_fitune(run: dict) -> bool:
    """As the peers compute, and as fitune does unless it is told otherwise."""
    return run["who"] == "fitune" and run["set"].get("profile.compute", "bf16") == "bf16"


def _setting(run: dict, key: str) -> int:
    """As `plan` filled it in, or as the entry asked for it."""
    return run.get(key, run["set"].get(f"profile.{key}", ""))


def _sources(runs: list[dict]) -> str:
    """What the works were measured on, in paragraphs of their own."""
    works = {}
    for run in runs:
        works.setdefault(run["source"], []).append(run["work"])
    return "\n".join(f"{'; '.join(dict.fromkeys(names))}: {source}.\n" for source, names in works.items()).strip()


def peers_table() -> str:
    """Each work's runs, the fastest first, then what failed."""
    lines = [
        "| work | who | products | rows a pass | layers kept | tokens/s per GPU | GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    order = sorted(newest_peers(), key=lambda run: (run["work"], -run.get("tokens_per_second", 0)))
    for run in order:
        ours = run["who"] == "fitune"
        rows, kept = (
            (_setting(run, "micro_batch"), _setting(run, "kept_layers"))
            if ours
            else (run["rows"], {"yes": "none", "no": "all"}[run["recompute"]])
        )
        compute = run["set"].get("profile.compute", "bf16") if ours else "bf16"
        lines.append(f"| {run['work']} | {_who(run)} | {compute} | {rows} | {kept} | {_found(run)} |")
    notes = "Median step; GiB that torch allocated. `cut`: the run's time was over before it ended."
    return "\n".join([*lines, "", notes, "", _sources(order)])


def _who(run: dict) -> str:
    """With what a name says behind its comma, as of two runs of one work: how many copies of the model."""
    return run["who"] + (f", {run['name'].partition(', ')[2]}" if run["name"].endswith(("one copy", "on each")) else "")


def _found(run: dict) -> str:
    if "error" in run:
        return "cut | " if run["error"].startswith("not done after") else "failed | "
    return f"{run['tokens_per_second']:,} | {run['peak_allocated_gib']:.1f}"
