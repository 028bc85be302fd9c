"""Writes docs/machines.md's table: what `train` chooses on machines of 1 to 8 GPUs, for each model and method.

python benchmarks/machines.py [--check]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tables import with_table
from fitune.errors import UsageError
from fitune.planning.limits import given_machine
from fitune.planning.search import find
from fitune.planning.words import rounded

PAGE = Path(__file__).resolve().parents[1] / "docs" / "machines.md"
GPUS, MEMORIES = (1, 2, 3, 4, 5, 8), (8, 12, 24, 48, 80)
MODELS, METHODS = ("8b", "70b"), ("qlora", "lora", "full")


def host_gib(gpus: int, gpu_gib: float) -> int:
    """RAM enough for 70B in bf16 and eight processes, as the larger of such machines have it."""
    return max(256, round(2 * gpus * gpu_gib))


def cell(recipe: str, gpus: int, gpu_gib: float) -> str:
    """Tokens/s of all GPUs; in brackets what is not as on most machines: GPUs used, what lies in RAM, small states."""
    try:
        found = find(recipe, (), given_machine(gpus, gpu_gib, host_gib(gpus, gpu_gib)))
    except UsageError:
        return "-"
    setup = found.plan.setup
    notes = [f"{setup.ranks} of {gpus}"] if found.idle else []
    notes += ["R"] if setup.offload else ["E"] if setup.embedding_offload else []
    notes += ["S" if setup.optimizer_offload else "s"] if setup.small_states else []
    notes += ["A"] if setup.activation_offload else []
    return rounded(found.plan.time.tokens_per_second) + (f" ({', '.join(notes)})" if notes else "")


def table() -> str:
    """One row for each model, method and card."""
    lines = [f"| model | method | GiB a card | {' | '.join(f'x {count}' for count in GPUS)} |"]
    lines += ["|" + "---|" * (3 + len(GPUS))]
    for model in MODELS:
        for method in METHODS:
            for gib in MEMORIES:
                cells = [cell(f"llama3_{model}_{method}", count, gib) for count in GPUS]
                lines.append(f"| {model.upper()} | {method} | {gib} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    before = PAGE.read_text(encoding="utf-8")
    after = with_table(before, "machines", table())
    if "--check" in sys.argv:
        sys.exit(f"{PAGE}: out of date, run: python benchmarks/machines.py" if after != before else 0)
    PAGE.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
