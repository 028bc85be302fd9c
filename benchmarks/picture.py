"""Draws docs/cards.png and docs/cards-dark.png, README's picture: what each measured tier takes of its card, its speed.

python benchmarks/picture.py
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.tables import CARDS, ROOT, shown_tiers

DOCS = ROOT / "docs"
WIDTH, LETTERS = 5.4, 10.5
"Inches and points: on a phone, 358 pixels wide, letters are 9 or 10 pixels high."


@dataclass(frozen=True)
class Look:
    file: str
    ground: str
    text: str
    card: str
    "What a card has."
    models: dict[str, str]


LOOKS = (
    Look("cards.png", "white", "black", "#e6e6e6", {"8B": "#7aa6c2", "70B": "#1f4e79"}),
    Look("cards-dark.png", "none", "#e6edf3", "#4a5260", {"8B": "#a5cbe3", "70B": "#3f8fd6"}),
)
"On GitHub's light pages and, transparent, on its dark ones."


def main() -> None:
    for look in LOOKS:
        with plt.rc_context(
            {name: look.text for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color")}
        ):
            draw(look)


def draw(look: Look) -> None:
    shown = {(run["recipe"], run["profile"]): run for run in shown_tiers()}
    bars = [
        (f"{model} on {cards}", size, run, look.models[model])
        for model in look.models
        for cards, (size, tiers) in CARDS.items()
        if (run := shown.get(tiers.get(model)))
    ]
    figure, axes = plt.subplots(figsize=(WIDTH, 0.42 * len(bars) + 1.4), layout="constrained", facecolor=look.ground)
    axes.set_facecolor(look.ground)
    for place, (label, size, run, colour) in enumerate(reversed(bars)):
        axes.barh(place, size, color=look.card, height=0.72)
        axes.barh(place, run["peak_gpu_gib"], color=colour, height=0.72)
        words = f"{run['peak_gpu_gib']:.1f} GiB, {run['tokens_per_second_per_gpu']:,.0f} tokens/s"
        axes.text(size + 0.8, place, words, va="center", fontsize=LETTERS)
        axes.text(-0.8, place, label, va="center", ha="right", fontsize=LETTERS)
    axes.set(xlim=(0, 100), yticks=[], xticks=range(0, 50, 10))
    axes.set_xlabel("GiB per GPU: taken, of what the card has (grey)", fontsize=LETTERS)
    figure.suptitle(
        "QLoRA of Llama 3: GiB and tokens/s per GPU\n"
        "H100s and H200s held to each card's memory,\nrows of 3,072 tokens (8 GB: 2,048)",
        fontsize=LETTERS,
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(DOCS / look.file, dpi=140, metadata={"Software": None})


if __name__ == "__main__":
    main()
