"""The one line that shows how far a run is: as many of its parts as fit the terminal, the most important first."""

from dataclasses import dataclass

from rich.text import Text

from fitune.launching.run_status import RunStatus
from fitune.progress import in_gb

SEPARATOR = "  "
ALWAYS = 0
"Importance of what stays on the narrowest terminal; the higher numbers go first."


@dataclass(eq=False)
class Part:
    importance: int
    style: str
    words: str
    shorter: str = ""


def live_line(status: RunStatus, now: float, width: int, *, ascii_only: bool = False) -> Text:
    """At most `width` columns. `now` is time.monotonic()."""
    parts = _training_parts(status, now, ascii_only) if status.steps else []
    parts = _stage_parts(status, now, brief=bool(parts)) + parts if status.doing else parts
    return _fitted(parts, width)


def _stage_parts(status: RunStatus, now: float, *, brief: bool) -> list[Part]:
    """Of what is done beside the steps."""
    seconds = max(0.0, now - status.began)
    parts = [Part(ALWAYS, "bold", status.doing)]
    if status.total:
        share = min(1.0, status.done / status.total)
        parts.append(Part(1, "", f"{share:.0%}"))
        if status.in_bytes and status.done and seconds:
            parts.append(Part(2, "", f"{in_gb(status.done / seconds)}/s"))
        if status.done:
            parts.append(Part(3, "", f"{clock(seconds * (1 - share) / share)} left"))
    elif not brief:
        parts.append(Part(1, "dim", clock(seconds)))
    return parts


def _training_parts(status: RunStatus, now: float, ascii_only: bool) -> list[Part]:
    parts = [Part(ALWAYS, "bold", f"step {status.step:,}/{status.steps:,}", f"{status.step}/{status.steps}")]
    if status.loss is not None:
        arrow, change = _trend(status.trend, ascii_only)
        parts.append(
            Part(1, "bold", f"loss {status.loss:.4f} {arrow}{change}".rstrip(), f"loss {status.loss:.2f}{arrow}")
        )
    if status.learning_rate is not None:
        parts.append(
            Part(5, "", f"lr {status.learning_rate:.2e}", f"lr {status.learning_rate:.0e}".replace("e-0", "e-"))
        )
    if speed := status.tokens_per_second:
        parts.append(Part(3, "", f"{speed:,.0f} tokens/s", f"{speed / 1000:.1f}k tok/s"))
    if status.gpu_memory_gib:
        of = f"/{status.gpu_memory_planned_gib:.1f}" if status.gpu_memory_planned_gib else ""
        memory = f"{status.gpu_memory_gib:.1f}{of} GiB"
        parts.append(Part(4, "", f"{memory} planned" if of else memory, memory))
    if status.ends_at is not None:
        left = clock(max(0.0, status.ends_at - now))
        parts.append(Part(2, "", f"{left} left", f"{left.removeprefix('0:')} left"))
    if status.checkpoint:
        parts.append(Part(6, "dim", f"checkpoint {status.checkpoint:,}", f"ckpt {status.checkpoint}"))
    return parts


def _trend(trend: float | None, ascii_only: bool) -> tuple[str, str]:
    """The direction in which the loss moves, and by how much."""
    if trend is None:
        return "", ""
    down, up = ("-", "+") if ascii_only else ("↓", "↑")
    return down if trend < 0 else up, f"{abs(trend):.3f}"


def _fitted(parts: list[Part], width: int) -> Text:
    """All in full where that fits; else the least important are shortened one by one, then left out one by one.

    What has room again beside those that are left is said in full, the most important first.
    """
    shown = [(part, part.words) for part in parts]
    by_importance = sorted(parts, key=lambda part: -part.importance)
    for part in by_importance:
        if _columns(shown) > width and part.shorter:
            shown = [(other, part.shorter if other is part else words) for other, words in shown]
    for part in by_importance:
        if _columns(shown) > width and part.importance > ALWAYS:
            shown = [(other, words) for other, words in shown if other is not part]
    if len(shown) < len(parts):
        for part in reversed(by_importance):
            longer = [(other, part.words if other is part else words) for other, words in shown]
            shown = longer if _columns(longer) <= width else shown
    line = Text(SEPARATOR).join(Text(words, part.style) for part, words in shown)
    line.truncate(width)
    return line


def _columns(shown: list[tuple[Part, str]]) -> int:
    return sum(len(words) for _, words in shown) + len(SEPARATOR) * (len(shown) - 1)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as 0:01:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
