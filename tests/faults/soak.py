"""Kills a training run at random moments, resumes it each time, and compares the end with a run nobody disturbed.

    python tests/faults/soak.py --kills 50 --seed 7          (or: make soak)

Each time one of: SIGKILL for the launcher, SIGKILL for one rank, SIGTERM for the launcher or one rank, SIGTERM and then
SIGKILL while it may be saving. Two ranks on the CPU, a tiny model, a checkpoint every other step.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
for needed in (HERE.parents[1], HERE.parent, HERE):
    sys.path.insert(0, str(needed))

import conftest  # noqa: E402
from commands import ADAPTER, Running, losses, saved_steps, train_command  # noqa: E402

STEPS_PER_KILL = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.kills} kills", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        soak(Path(folder), options.kills, random.Random(options.seed))


def soak(folder: Path, kills: int, draw: random.Random) -> None:
    base, prepared = folder / "base", folder / "prepared"
    conftest.build_base(base, vocab_size=512, hidden_size=64, intermediate_size=192)
    prepared.mkdir()
    for split, count, seed in (("train", 48, 1), ("test", 8, 2)):
        conftest.write_split(prepared, split, count, seed)
    steps = kills * STEPS_PER_KILL

    def command(output: Path) -> list[str]:
        sets = {"training.save_steps": 2, "training.save_total_limit": 2, "lora.dropout": 0.1}
        return train_command(base, prepared, output, steps, **sets)

    started = time.monotonic()
    undisturbed = Running(command(folder / "undisturbed"), folder / "log")
    assert undisturbed.wait(3600) == 0, undisturbed.log.read_text()[-3000:]
    print(f"undisturbed: {steps} steps in {time.monotonic() - started:.0f} s", flush=True)

    run, done = folder / "run", 0
    while True:
        resume = ["--resume"] if (run / "checkpoints").is_dir() and saved_steps(run) else []
        if not resume:
            shutil.rmtree(run, ignore_errors=True)
        running = Running([*command(run), *resume], folder / "log")
        if done == kills:
            break
        code = disturb(running, run, draw)
        done += 1
        reached = max(saved_steps(run), default=0) if (run / "checkpoints").is_dir() else 0
        print(f"kill {done}: exit code {code}, newest checkpoint {reached} of {steps}", flush=True)
        assert code in (-9, -15, 1, 75) or (code == 0 and reached == steps), running.log.read_text()[-3000:]
    assert running.wait(3600) == 0, running.log.read_text()[-3000:]
    assert losses(run) == losses(folder / "undisturbed"), "the losses differ"
    assert (run / ADAPTER).read_bytes() == (folder / "undisturbed" / ADAPTER).read_bytes(), "the adapters differ"
    print(f"the same {steps} losses and the same adapter, byte for byte, after {done} kills")


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
