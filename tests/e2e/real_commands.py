"""Runs `python cli.py …` as a user would, keeps what it prints, and judges that."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
UNWELCOME = re.compile(r"traceback|warn|Failed to load", re.IGNORECASE)
ALLOWED: dict[str, str] = {}
"Expressions for lines that may be printed although they match, with the reason."
TABLE = re.compile("[│┃┏┡└├]")
"Begins the lines of tables, which show what the model said."


LONGEST = 900
"Seconds that one command may take."


class Failed(Exception):
    """A promise that was not kept, in one line or with the end of what was printed."""


def unwelcome_lines(printed: str) -> list[str]:
    """Lines that a normal run must not print: tracebacks, libraries' warnings."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", printed)]
    return [
        line
        for line in lines
        if UNWELCOME.search(line) and not TABLE.match(line) and not any(re.search(e, line) for e in ALLOWED)
    ]


class Commands:
    """The commands of one part. `steps` has a line for each: name, seconds, exit code."""

    def __init__(self, logs: Path, environment: dict[str, str], ends: float):
        """`ends` is the moment of `time.monotonic` at which a command that still runs is stopped."""
        logs.mkdir(parents=True, exist_ok=True)
        self.logs, self.environment, self.ends, self.steps = logs, environment, ends, []
        self.printed_badly: list[str] = []

    def call(self, step: str, *words, typed: str = "", expect: tuple[int, ...] = (0,)) -> str:
        """What `python cli.py WORDS` printed. Raises Failed for another exit code and when it takes too long."""
        process, began = self._start(step, words), time.monotonic()
        return self._finish(step, process, began, typed, expect)

    def interrupt(self, step: str, *words, signal_number: int, when) -> str:
        """The same for a command that is sent a signal as soon as `when()` holds, and must leave with code 75."""
        process, began = self._start(step, words), time.monotonic()

        def send() -> None:
            while process.poll() is None:
                if when():
                    process.send_signal(signal_number)  # to the launcher alone, as `kill PID` does
                    return
                time.sleep(0.02)

        threading.Thread(target=send, daemon=True).start()
        return self._finish(step, process, began, "", (75,))

    def _start(self, step: str, words: tuple) -> subprocess.Popen:
        if time.monotonic() > self.ends:
            raise Failed(f"{step}: not begun, the time was up")
        return subprocess.Popen(
            [sys.executable, "cli.py", *map(str, words)],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=(self.logs / f"{step}.log").open("w", encoding="utf-8"),
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def _finish(self, step, process, began, typed, expect) -> str:
        stopped = ""
        try:
            process.communicate(typed, timeout=max(1, min(LONGEST, self.ends - began)))
        except subprocess.TimeoutExpired:
            _kill(process)
            stopped = ", stopped as it took too long"
        printed = (self.logs / f"{step}.log").read_text(encoding="utf-8", errors="replace")
        seconds = round(time.monotonic() - began, 1)
        self.steps.append({"step": step, "seconds": seconds, "exit": process.returncode})
        self.printed_badly += [f"{step}: {line[:300]}" for line in unwelcome_lines(printed)]
        if process.returncode not in expect:
            command = " ".join(["python", *process.args[1:]])
            raise Failed(
                f"{step}: exit code {process.returncode} after {seconds} s{stopped}: {command}\n{printed[-3000:]}"
            )
        return printed


def _kill(process: subprocess.Popen) -> None:
    """A command and its ranks, which run in sessions of their own."""
    import psutil

    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait()


def environment(own_gpus: list[int], cap_gib: float | None) -> dict[str, str]:
    """For commands without network and colours. `own_gpus` hides the others, `cap_gib` lets ranks share GPUs."""
    result = os.environ | {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "150", "TERM": "dumb"}
    result.pop("PYTHONDONTWRITEBYTECODE", None)
    result |= {"CUDA_VISIBLE_DEVICES": ",".join(map(str, own_gpus))}
    result["OMP_NUM_THREADS"] = "2" if own_gpus else "1"  # threads of commands side by side would wait, spinning
    if not own_gpus:
        return result
    return result | {
        "FITUNE_GPU_CAP_GIB": f"{cap_gib:.1f}",
        "NCCL_SOCKET_NTHREADS": "4",
        "NCCL_NSOCKS_PERTHREAD": "4",
    }
