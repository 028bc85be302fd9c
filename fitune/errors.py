"""The errors a user is meant to read: one line that says what was given, what is allowed, what to type next."""

import re
import sys
from difflib import get_close_matches

CRASHED = 70
"A rank's exit code for what nobody expected; `fitune train` may start again after it, and ends with 1."
INTERRUPTED = 75
"Exit code of a run that was told to stop and has saved what it did."


ENDED_BY_A_SIGNAL = 128
"Exit code of any other command that a signal ended: this and the signal's number, as shells have it."
STOPPED_BY_CTRL_C = 130


class FituneError(Exception):
    """A run that cannot go on. The command line prints the message without a traceback and exits with `exit_code`."""

    exit_code = 1


class Interrupted(FituneError):
    """A run that was told to stop and did."""

    exit_code = INTERRUPTED


class UsageError(FituneError):
    """The caller gave something wrong: a path, a name, a key, a value."""

    exit_code = 2


def nearest(given: str, allowed, *, within: str = "") -> str:
    """`; did you mean 'x'?` for a likely typo, else the list of what is allowed. `within` is put before a key."""
    allowed = [str(name) for name in allowed]
    if match := closest(str(given), allowed):
        return f"; did you mean '{within}{match}'?"
    return f"; allowed: {', '.join(sorted(allowed))}" if len(allowed) <= 20 else ""


def closest(given: str, allowed: list[str]) -> str | None:
    """What `given` is likely a typo of."""
    return next(iter(get_close_matches(given, allowed, n=1, cutoff=0.6)), None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, or Python, got no memory, of a GPU or of the host; told without importing torch."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error) or is_out_of_gpu_memory(error)


def is_out_of_gpu_memory(error: BaseException) -> bool:
    """Torch's allocator got none; or CUDA, cuBLAS, NCCL or Triton beside it, as where another process holds the GPU."""
    beside = r"(?i)\bcuda\b.*\bout of memory\b|CUBLAS_STATUS_ALLOC_FAILED|Failed to CUDA calloc"
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and re.search(beside, str(error)) is not None
    )


def say_while_training(message: str) -> None:
    """To stderr, on a line of its own: on a terminal a progress bar leaves the cursor at the end of its line."""
    print(f"\n{message}" if sys.stderr.isatty() else message, file=sys.stderr, flush=True)
