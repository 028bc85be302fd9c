"""Kills a training run at random moments, resumes it each time with changes, and compares the end with a calm run.

    python tests/faults/soak.py --kills 50 --seed 7          (or: make soak)

Each time one of: SIGKILL for the launcher or one rank, SIGTERM for the launcher or one rank, SIGTERM and then SIGKILL
while it may be saving. Each start draws the number of ranks, rows a pass, kept layers, offload, steps asked for, how
often to save and to evaluate and how many checkpoints to keep. The calm run computes with the same of them at the same
steps, evaluates never and saves at the ends only: its losses and its adapter are the same, byte for byte. A tiny model
on the CPU.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
for needed in (HERE.parents[1], HERE.parent, HERE):
    sys.path.insert(0, str(needed))

import conftest  # noqa: E402
from commands import ADAPTER, Running, accelerate_text, losses, saved_steps, train_command  # noqa: E402

STEPS_PER_KILL = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.kills} kills", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        soak(Path(folder), options.kills, random.Random(options.seed))


@dataclass(frozen=True)
class Settings:
    """What a start is told that is not the run itself."""

    ranks: int
    micro_batch: int
    kept_layers: int
    offloaded: bool
    steps: int
    save_steps: int
    keep: int
    eval_steps: int = 0
    "0: no evaluations."

    @classmethod
    def drawn(cls, draw: random.Random, reached: int, last: int) -> "Settings":
        ranks = draw.choice([1, 2])
        micro_batch = draw.choice([1, 2, 4][: 4 - ranks])  # of the recipe's four rows a step
        steps = draw.choice([last, last, draw.randint(min(reached + 4, last), last)])
        return cls(
            ranks,
            micro_batch,
            kept_layers=draw.choice([0, 1, 2]),
            offloaded=draw.choice([False, True]),
            steps=steps,
            save_steps=draw.choice([1, 2, 3]),
            keep=draw.choice([1, 2, 3]),
            eval_steps=draw.choice([0, 2, 3]),
        )


def soak(folder: Path, kills: int, draw: random.Random) -> None:
    base, prepared = folder / "base", folder / "prepared"
    conftest.build_base(base, vocab_size=512, hidden_size=64, intermediate_size=192)
    prepared.mkdir()
    for split, count, seed in (("train", 48, 1), ("test", 8, 2)):
        conftest.write_split(prepared, split, count, seed)
    for ranks, offloaded in product((1, 2), (False, True)):
        accelerate_config(folder, ranks, offloaded).write_text(accelerate_text(ranks, offloaded))
    last = kills * STEPS_PER_KILL

    def start(run: Path, settings: Settings) -> Running:
        sets = {
            "training.save_steps": settings.save_steps, "training.save_total_limit": settings.keep,
            "training.lr_scheduler_type": "constant", "lora.dropout": 0.1, "profile.micro_batch": settings.micro_batch,
            "profile.kept_layers": settings.kept_layers,
            "profile.accelerate_config": accelerate_config(folder, settings.ranks, settings.offloaded),
        }  # fmt: skip
        if settings.eval_steps:
            sets |= {"training.eval_strategy": "steps", "training.eval_steps": settings.eval_steps}
        resume = ["--resume"] if newest(run) else []  # what has no checkpoint yet begins again, --resume or not
        if not resume:
            (run / "metrics.jsonl").unlink(missing_ok=True)
        return Running(
            [*train_command(base, prepared, run, settings.steps, **sets), *resume], folder / "log", slowly=True
        )

    run, parts = folder / "run", []
    for kill in range(1, kills + 1):
        settings = Settings.drawn(draw, newest(run), last)
        parts.append((newest(run), settings))
        running = start(run, settings)
        code = disturb(running, run, draw)
        print(f"kill {kill}: {settings}: exit code {code}, newest checkpoint {newest(run)} of {last}", flush=True)
        ended = code == 0 and newest(run) == settings.steps
        assert code in (-9, -15, 1, 75) or ended, running.log.read_text()[-3000:]
    final = Settings(2, 2, kept_layers=0, offloaded=False, steps=last, save_steps=2, keep=2)
    parts.append((newest(run), final))
    running = start(run, final)
    assert running.wait(3600) == 0, running.log.read_text()[-3000:]

    calm = folder / "calm"
    for (begun, settings), (end, _) in zip(parts, [*parts[1:], (last, None)], strict=True):
        if begun < end:
            running = start(calm, replace(settings, steps=end, save_steps=end, keep=2, eval_steps=0))
            assert running.wait(3600) == 0, running.log.read_text()[-3000:]
    assert losses(run) == losses(calm), "the losses differ"
    assert (run / ADAPTER).read_bytes() == (calm / ADAPTER).read_bytes(), "the adapters differ"
    print(f"the same {last} losses and the same adapter, byte for byte, after {kills} kills with changes")


def accelerate_config(folder: Path, ranks: int, offloaded: bool) -> Path:
    return folder / f"{ranks}{'_offloaded' if offloaded else ''}.yaml"


def newest(run: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    return max(saved_steps(run), default=0) if (run / "checkpoints").is_dir() else 0


def disturb(running: Running, run: Path, draw: random.Random) -> int:
    """Waits a random while, does one random thing to the run; its exit code, -9 or -15 for a launcher that died."""
    began, log = time.time(), run / "metrics.jsonl"
    if draw.random() < 0.8:  # else while it starts
        while running.process.poll() is None and not (log.exists() and log.stat().st_mtime > began + 2):
            time.sleep(0.1)
    time.sleep(draw.uniform(0, 4))
    target = draw.choice(["launcher", "rank"])
    for number in draw.choice([[signal.SIGKILL], [signal.SIGKILL], [signal.SIGTERM], [signal.SIGTERM, signal.SIGKILL]]):
        ranks = running.ranks() if running.process.poll() is None else {}
        victim = ranks[draw.choice(sorted(ranks))] if target == "rank" and ranks else running.process
        if running.process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                victim.send_signal(number)
        time.sleep(draw.uniform(0, 0.5))
    ranks = running.ranks() if running.process.poll() is None else {}
    code = running.wait(120)
    for rank in ranks.values():
        rank.wait(30)
    return code


if __name__ == "__main__":
    main()
