"""How fast the disk is that a run is saved on, and whether its checkpoints are too large for it."""

import os
import tempfile
import time
from pathlib import Path

from fitune.config.schema import Run
from fitune.errors import UsageError
from fitune.planning.async_save import checkpoint_bytes

WRITTEN_MIB = 64
GB = 10**9
LARGE_GB = 5
"Smaller checkpoints, as those of adapters, are written in a moment anywhere."
LONG_SECONDS = 120


def written_gb_s(folder: Path) -> float:
    """Raises OSError where nothing can be written. What is read back would come from memory: it is not timed."""
    data = os.urandom(WRITTEN_MIB * 2**20)  # a disk that compresses must not look fast
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".fitune-disk-speed-") as file:
        began = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return len(data) / (time.perf_counter() - began) / GB


def slow_to_save(run: Run) -> str | None:
    """What to say of a run whose checkpoints take minutes to write, one line; None where they don't."""
    try:
        size = checkpoint_bytes(run) / GB
    except UsageError:  # a model whose sizes are not known, trained by --force
        return None
    if size < LARGE_GB:
        return None
    folder = next(place for place in (run.folder.absolute(), *run.folder.absolute().parents) if place.is_dir())
    try:
        speed = written_gb_s(folder)
    except OSError:
        return None  # the run's folder is made next, which says what is wrong
    if size / speed < LONG_SECONDS:
        return None
    return (
        f"{folder} is written at {speed:.2g} GB/s: a checkpoint of {size:,.0f} GB takes {size / speed / 60:.0f} "
        f"minutes; --output on a faster disk, or a larger training.save_steps"
    )
