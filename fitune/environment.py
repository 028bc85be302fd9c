"""The environment variables that fitune reads, beside those of Hugging Face and torch."""

import os

from fitune.errors import UsageError

HUNG_AFTER = "FITUNE_HUNG_AFTER_SECONDS"
GPU_CAP = "FITUNE_GPU_CAP_GIB"
COMMAND = "FITUNE_COMMAND"
HEARTBEATS = "FITUNE_HEARTBEATS"
LOCK_HELD = "FITUNE_RUN_LOCK_HELD"
TYPED = "FITUNE_TYPED"
OUTPUT = "FITUNE_OUTPUT"
MEANINGS = {
    HUNG_AFTER: "How long a rank may take for one layer before it counts as hung. [default: 45]",
    GPU_CAP: "Tries a small card on a large one: each rank gets so much of its memory, and ranks may share a GPU.",
    "set by fitune itself": f"{COMMAND}, {HEARTBEATS}, {LOCK_HELD}, {OUTPUT}, {TYPED}: for processes that it starts.",
}


def let_segments_grow() -> None:
    """Of GPU memory: they leave no unusable gaps between a layer's weights and the next one's.

    Torch reads the variable when it first takes GPU memory, so a rank may set it itself, whoever started it.
    """
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def keep_torch_brief() -> None:
    """Torch's C++ prints errors, not warnings: of a machine that is gone its store has a page, ranks say it in a line.

    Torch reads the variable when it is imported; ranks inherit it.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def number(name: str, default: float | None = None) -> float | None:
    """The value of a variable, `default` where it is not set. Raises UsageError for one that is no number above 0."""
    text = os.environ.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise UsageError(f"{name}={text}: expected a number above 0, as in {name}=90")
    return value
