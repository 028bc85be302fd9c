"""What a run does at the moment, told by one rank of a machine in a small file and shown by the launcher there."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from fitune.columns import short
from fitune.config.command_name import command
from fitune.environment import HEARTBEATS
from fitune.output_folder import checkpoints

FILE = "status.json"
"In the folder of the heartbeats."


@dataclass
class RunStatus:
    """Times are those of time.monotonic(), which all processes of a machine share; memory is in GiB.

    `doing` is what happens beside the steps, empty while they are trained: `done` of `total` bytes or passes of it
    since `began`. `checkpoint` is the step that was saved last. `trend` is the loss's, see `loss_trend`.
    """

    doing: str = ""
    began: float = 0.0
    done: float = 0.0
    total: float = 0.0
    in_bytes: bool = False
    step: int = 0
    steps: int = 0
    loss: float | None = None
    trend: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    gpu_memory_gib: float | None = None
    gpu_memory_planned_gib: float | None = None
    ends_at: float | None = None
    checkpoint: int | None = None

    def begin(self, doing: str, total: float = 0.0, *, in_bytes: bool = False) -> None:
        self.doing, self.total, self.in_bytes, self.done, self.began = doing, total, in_bytes, 0.0, time.monotonic()


def tell(status: RunStatus) -> None:
    """Where a launcher watches, replaces what it reads; what is half written is never read."""
    if not (folder := os.environ.get(HEARTBEATS)):
        return
    unfinished = Path(folder) / f".{FILE}"
    unfinished.write_text(json.dumps(asdict(status)), encoding="utf-8")
    unfinished.replace(Path(folder) / FILE)


def read_status(folder: Path) -> RunStatus | None:
    """None until a rank has told one."""
    try:
        return RunStatus(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def loss_trend(losses: list[float], most: int = 5) -> float | None:
    """The mean of the newest half of the last `2 * most` logged losses less that of the older half; None for one."""
    half = min(most, len(losses) // 2)
    if not half:
        return None
    return (sum(losses[-half:]) - sum(losses[-2 * half : -half])) / half


def stopped_before_a_step(folder: Path) -> str:
    """What to say of a run that a signal ends before it has trained a step since it was started."""
    if not checkpoints(folder / "checkpoints"):
        return "stopped: before the first step, with nothing to save"
    go_on = command("train", "--resume", short(str(folder)))
    return f"stopped: before another step, with nothing new to save; go on with: {go_on}"
