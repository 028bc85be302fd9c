"""A process of its own that checks chunks beside others, and ends with the one that started it."""

import gc
import os
import signal
import threading
import time

from fitune.data.row_checks import Checker, Outcome, Shape
from fitune.data.rules import Rules


def start_worker(rules: Rules) -> None:
    """Called once in each process: compiling the template and the tokenizer is not repeated for each chunk."""
    global _checker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    _checker = Checker(rules)
    gc.freeze()  # what came with the fork stays: collections need not walk over it, nor copy its pages


def check_in_worker(chunk, shape: Shape) -> Outcome:
    return _checker.check(chunk, shape)


def _end_with_parent(parent: int) -> None:
    """A worker whose parent was killed would wait for its next chunk for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
