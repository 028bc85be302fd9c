"""What a run that was tried did: exit code, what it printed, logged and left; and how two of them differ."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

SAYS_HOW_LONG = re.compile(r"\d+(\.\d+)?")
NOT_COMPARED = ("runtime", "per_second")
"Parts of names in metrics.jsonl that a clock measured."


@dataclass(frozen=True)
class Outcome:
    """One command's. Numbers of steps, rates and losses are those of metrics.jsonl."""

    code: int
    printed: str
    metrics: list[dict]
    saved: list[int]
    "Steps of the checkpoints that are there at the end."
    result: str
    "SHA-256 of the adapter."
    folders: list[str]

    @classmethod
    def of(cls, code: int, printed: str, run: Path) -> "Outcome":
        adapter, log = run / "adapter/adapter_model.safetensors", run / "metrics.jsonl"
        lines = map(json.loads, log.read_text().splitlines()) if log.is_file() else []
        metrics = [{k: v for k, v in line.items() if not any(part in k for part in NOT_COMPARED)} for line in lines]
        steps = sorted(int(path.name.rpartition("-")[2]) for path in (run / "checkpoints").glob("checkpoint-*"))
        result = hashlib.sha256(adapter.read_bytes()).hexdigest() if adapter.is_file() else ""
        folders = sorted(path.name for path in run.glob("*") if path.is_dir())
        return cls(code, printed, metrics, steps, result, folders)

    def as_json(self) -> dict:
        return asdict(self)

    @property
    def has_traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.printed

    @property
    def refusal(self) -> str:
        """What the error says, without the file that it names first."""
        lines = [line for line in self.printed.splitlines() if line.startswith("error: ")]
        return re.sub(r"^error: (\S+\.yaml( with --set)?: )?", "", lines[-1]) if lines else ""

    def column(self, key: str) -> dict[int, float]:
        return {line["step"]: line[key] for line in self.metrics if key in line}

    @property
    def lines(self) -> set[str]:
        """Printed, but for progress bars and numbers."""
        lines = re.split(r"[\r\n]+", self.printed)
        return {SAYS_HOW_LONG.sub("N", line.strip()) for line in lines if line.strip() and not _is_bar(line)}


def _is_bar(line: str) -> bool:
    return bool(re.search(r"\d+%\||━|\d+ examples|it/s|s/it", line))


def differences(found: Outcome, base: Outcome) -> list[str]:
    """In words, what `found` did otherwise than `base`; empty if it is the same run."""
    said = [_difference_of(key, word, found, base) for key, word in NUMBERS.items()]
    said += [_steps("logged", found.column("loss"), base.column("loss"))]
    said += [_steps("evaluated", found.column("eval_loss"), base.column("eval_loss"))]
    said += [_steps("saved", found.saved, base.saved)]
    said += [f"writes {name}/" for name in found.folders if name not in base.folders]
    found_only = found.lines - base.lines
    said += [f"prints {len(found_only)} more kinds of lines"] if len(found.lines) > len(base.lines) + 10 else []
    said = [part for part in said if part]
    if not said and found.result != base.result:
        said = ["other weights"]
    if not said and (chosen := [line for line in found_only if "becomes the result" in line]):
        said = [f"says: {chosen[0]}"]
    return said


NUMBERS = {"learning_rate": "learning rates", "loss": "losses", "grad_norm": "gradient norms"}


def _difference_of(key: str, word: str, found: Outcome, base: Outcome) -> str:
    """Numbers of the same step that are not the same."""
    mine, theirs = found.column(key), base.column(key)
    steps = [step for step in mine if step in theirs and mine[step] != theirs[step]]
    return f"other {word} from step {min(steps)} on" if steps else ""


def _steps(verb: str, found, base) -> str:
    """Sorted steps, where they are others."""
    if list(found) == list(base):
        return ""
    return f"{verb} at {', '.join(map(str, sorted(found)))}" if found else f"not {verb}"
