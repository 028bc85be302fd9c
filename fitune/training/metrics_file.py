"""What a run logs, kept in its folder: metrics.jsonl, and loss.png at the end."""

import json
import time
from contextlib import suppress
from pathlib import Path

from transformers import TrainerCallback


class MetricsFile(TrainerCallback):
    """Appends every log line to metrics.jsonl and draws loss.png at the end. Main process only.

    `seconds` in a line is the time trained until then, before an interruption too; pauses don't count.
    """

    def __init__(self, folder: Path):
        self.path = folder / "metrics.jsonl"
        self.picture = folder / "loss.png"
        self.began = time.monotonic()  # were all of the training one piece

    def on_train_begin(self, args, state, control, **kwargs):
        """Forgets what an interrupted run logged after the checkpoint that is resumed."""
        self.began = time.monotonic()
        if state.is_world_process_zero and self.path.exists():
            kept = [line for line in self._lines() if line["step"] <= state.global_step]
            rewritten = self.path.with_suffix(".partial")
            rewritten.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            rewritten.replace(self.path)
            self.began -= next((line["seconds"] for line in reversed(kept) if "seconds" in line), 0.0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            with self.path.open("a", encoding="utf-8") as stream:
                seconds = round(time.monotonic() - self.began, 3)
                stream.write(json.dumps({"step": state.global_step, **logs, "seconds": seconds}) + "\n")

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            draw_loss(self._lines(), self.picture)

    def _lines(self) -> list[dict]:
        """But for one that a power cut left half written."""
        lines = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                lines.append(json.loads(line))
        return lines


def draw_loss(lines: list[dict], picture: Path) -> None:
    """The training loss (and the held-out loss, where it was measured) over the steps, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    for key, label in (("loss", "training"), ("eval_loss", "held out")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 3 else None)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120, bbox_inches="tight")
