"""Draws the training losses of a report's runs beside each other: of fp8_learns.py or small_states_learn.py.

python benchmarks/learning_curves.py docs/fp8_learns.png benchmarks/results/fp8-learns-*.json
python benchmarks/learning_curves.py docs/small_states_learn.png benchmarks/results/small-states-learn-*.json
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WINDOW = 10  # steps of the mean that is drawn: the rows of one step differ too much


def main() -> None:
    output, *files = map(Path, sys.argv[1:])
    figure, axes = plt.subplots(1, len(files), figsize=(5 * len(files), 4), sharey=True, squeeze=False)
    for ax, file in zip(axes[0], files, strict=True):
        report = json.loads(file.read_text(encoding="utf-8"))
        for name, run in report["runs"].items():
            losses = [step["loss"] for step in run["curve"]]
            means = [sum(losses[i : i + WINDOW]) / WINDOW for i in range(len(losses) - WINDOW + 1)]
            ax.plot(range(WINDOW, len(losses) + 1), means, label=name, linewidth=1.2)
        ax.set(title=file.stem.partition("-h200")[0], xlabel="step")
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel(f"training loss, mean of {WINDOW} steps")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(output, dpi=100)


if __name__ == "__main__":
    main()
