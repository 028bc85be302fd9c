"""Draws docs/cards.png, README's picture: what each measured tier takes of its card, and its speed.

python benchmarks/picture.py
"""

import sys
from pathlib import Path

import matplotlib

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.tables import CARDS, ROOT, shown_tiers

PICTURE = ROOT / "docs" / "cards.png"
COLOURS = {"8B": "#7aa6c2", "70B": "#1f4e79"}


def main() -> None:
    shown = {(run["recipe"], run["profile"]): run for run in shown_tiers()}
    bars = [
        (f"{model} on {cards}", size, run, COLOURS[model])
        for model in COLOURS
        for cards, (size, tiers) in CARDS.items()
        if (run := shown.get(tiers.get(model)))
    ]
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(bars) + 1.1), layout="constrained")
    for place, (label, size, run, colour) in enumerate(reversed(bars)):
        axes.barh(place, size, color="#e6e6e6", height=0.72)
        axes.barh(place, run["peak_gpu_gib"], color=colour, height=0.72)
        words = f"{run['peak_gpu_gib']:.1f} GiB, {run['tokens_per_second_per_gpu']:,.0f} tokens/s per GPU"
        axes.text(size + 0.6, place, words, va="center", fontsize=9)
        axes.text(-0.6, place, label, va="center", ha="right", fontsize=9)
    axes.set(xlim=(0, 72), yticks=[], xlabel="GiB per GPU: taken, of what the card has (grey)")
    axes.set_title(
        "QLoRA of Llama 3 on H100s and H200s held to each card's memory, rows of 3,072 tokens (8 GB: 2,048)",
        fontsize=10,
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(PICTURE, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
