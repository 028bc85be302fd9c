"""What a run says while it trains: a line every `logging_steps`, what it does between, its status for the launcher."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers import TrainerCallback

from fitune.environment import OUTPUT
from fitune.launching.live_line import clock
from fitune.launching.run_status import RunStatus, loss_trend, tell
from fitune.progress import bar, how_long
from fitune.training.distributed import is_main_process

TELL_SECONDS = 0.1
HEADER_EVERY = 20


class RunReport(TrainerCallback):
    """Rank 0 prints, unless the launcher was told to be quiet; one rank of each machine tells its launcher the status.

    Where the launcher shows that status, what is done now is not printed as well.
    """

    def __init__(self):
        output = os.environ.get(OUTPUT, "")
        self.prints = is_main_process() and output != "quiet"
        self.prints_stages = self.prints and output != "live"
        self.tells = os.environ.get("LOCAL_RANK", "0") == "0"
        self.status = RunStatus()
        self.last_checkpoint: Callable[[], int | None] = lambda: None  # the step of the newest that is whole
        self.lines = 0
        self._told = 0.0
        self._mark: tuple[int, float] | None = None  # (step, time) from where the time left is reckoned

    def begin(self, doing: str) -> None:
        """From now on the run does this."""
        self.status.begin(doing)
        self._tell()
        if self.prints_stages:
            print(doing, file=sys.stderr, flush=True)

    @contextmanager
    def bar(self, doing: str, total: float, *, in_bytes: bool = False) -> Iterator[Callable[..., None]]:
        """As `fitune.progress.bar`; a launcher that shows the status shows this in its live line."""
        self.status.begin(doing, total, in_bytes=in_bytes)
        self._tell()
        with bar(doing, total, in_bytes=in_bytes, show=self.prints_stages) as advance:

            def advance_both(*amount) -> None:
                advance(*amount)
                self.status.done += amount[0] if in_bytes else 1
                self._tell(at_most_every=TELL_SECONDS)

            yield advance_both
        if self.prints and not self.prints_stages:
            took = how_long(total, time.monotonic() - self.status.began, in_bytes)
            print(f"{doing}: {took}", file=sys.stderr, flush=True)

    def on_train_begin(self, args, state, control, **kwargs):
        self.status.step, self.status.steps = state.global_step, state.max_steps
        steps = f"training {state.max_steps - state.global_step:,} steps"
        self.begin(steps if args.use_cpu else f"{steps}; the first compiles kernels")

    def on_step_end(self, args, state, control, **kwargs):
        now, status = time.monotonic(), self.status
        status.step, status.checkpoint = state.global_step, self.last_checkpoint()
        if self._mark is None:  # the first step is slower than the others
            self._mark = state.global_step, now
        elif state.global_step > self._mark[0]:
            seconds = (now - self._mark[1]) / (state.global_step - self._mark[0])
            status.ends_at = now + seconds * (state.max_steps - state.global_step)
        status.begin("saving" if control.should_save else "")
        if control.should_evaluate:
            status.begin("evaluating")
        self._tell(at_most_every=0 if status.doing else TELL_SECONDS)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if not self.status.total:
            self.status.total = len(eval_dataloader)
        self.status.done += 1
        self._tell(at_most_every=TELL_SECONDS)

    def on_evaluate(self, args, state, control, **kwargs):
        self.status.begin("saving" if control.should_save else "")
        self._tell()

    def on_save(self, args, state, control, **kwargs):
        self.status.checkpoint = self.last_checkpoint()
        self.status.begin("")
        self._tell()

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs, status = logs or {}, self.status
        if "loss" in logs:
            status.loss = logs["loss"]
            status.trend = loss_trend([entry["loss"] for entry in state.log_history if "loss" in entry])
            status.learning_rate = logs.get("learning_rate")
            status.tokens_per_second = logs.get("tokens_per_second", status.tokens_per_second)
            status.gpu_memory_gib = logs.get("gpu_memory_gib")
            status.gpu_memory_planned_gib = logs.get("gpu_memory_planned_gib")
            self._tell()
        if self.prints and (line := self._line(logs, state)):
            print(line, flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        self.status.begin("saving the result")
        self._tell()

    def _line(self, logs: dict, state) -> str | None:
        where = f"{state.global_step:,}/{state.max_steps:,}"
        if "eval_loss" in logs:
            return f"{where:>13}  {held_out(logs)}"
        if "train_runtime" in logs:
            return f"trained {state.global_step:,} steps in {clock(logs['train_runtime'])}"
        if "loss" not in logs:
            return None
        left = None if self.status.ends_at is None else max(0.0, self.status.ends_at - time.monotonic())
        header = f"{table_header(logs)}\n" if self.lines % HEADER_EVERY == 0 else ""
        self.lines += 1
        return header + table_row(where, logs, left)

    def _tell(self, at_most_every: float = 0.0) -> None:
        now = time.monotonic()
        if self.tells and now - self._told >= at_most_every:
            self._told = now
            tell(self.status)


COLUMNS = {
    "step": 13,
    "loss": 8,
    "grad norm": 9,
    "learning rate": 13,
    "tokens/s": 9,
    "GPU GiB": 7,
    "left": 8,
}


def _shown(logs: dict) -> list[str]:
    return [name for name in COLUMNS if name != "GPU GiB" or "gpu_memory_gib" in logs]


def table_header(logs: dict) -> str:
    """Of the log lines, as wide as the numbers below; 79 columns at most."""
    return "  ".join(f"{name:>{COLUMNS[name]}}" for name in _shown(logs))


def table_row(step: str, logs: dict, seconds_left: float | None) -> str:
    """One log line. A number that is not logged leaves its column empty."""
    cells = {
        "step": step,
        "loss": f"{logs['loss']:.4f}",
        "grad norm": _number(logs.get("grad_norm"), "#.3g").rstrip("."),
        "learning rate": _number(logs.get("learning_rate"), ".2e"),
        "tokens/s": _number(logs.get("tokens_per_second"), ",.0f"),
        "GPU GiB": _number(logs.get("gpu_memory_gib"), ".1f"),
        "left": "" if seconds_left is None else clock(seconds_left),
    }
    return "  ".join(f"{cells[name]:>{COLUMNS[name]}}" for name in _shown(logs)).rstrip()


def held_out(logs: dict) -> str:
    """The numbers of an evaluation during training."""
    return (
        f"held out: loss {logs['eval_loss']:.4f}, perplexity {logs['eval_perplexity']:,.4g}, "
        f"token accuracy {logs['eval_token_accuracy']:.1%}"
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
