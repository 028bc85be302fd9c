"""SIGTERM and Ctrl-C: all ranks finish the optimizer step, save it, and leave with exit code 75.

The launcher only passes the signal on; this is a callback of the trainer, and so it stands in training/.
"""

import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from fitune.config.command_name import command
from fitune.errors import INTERRUPTED, Interrupted
from fitune.launching.run_status import stopped_before_a_step
from fitune.training.distributed import is_main_process


class Interruption(TrainerCallback):
    """Asks after each step whether any rank was told to stop: one number over gloo, below a millisecond.

    Made once the ranks have joined: one that waits in torch's C++ for a rank that was refused would not hear, and
    torch's launcher would kill it after 30 s. Before the first step a signal ends the process at once, there is nothing
    to save; while a checkpoint or the result is written it waits. Further SIGTERMs change nothing here: at a second
    signal the launcher kills its ranks (`fitune.launching.signals`).
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.told = self.training = self.stopping = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame) -> None:
        if not self.training:
            if is_main_process():
                print(stopped_before_a_step(self.folder), file=sys.stderr)
            raise SystemExit(INTERRUPTED)
        self.told = True

    def on_train_begin(self, args, state, control, **kwargs):
        self.training = True

    def on_step_end(self, args, state, control, **kwargs):
        told = torch.tensor([int(self.told)])
        dist.all_reduce(told, dist.ReduceOp.MAX)
        if told.item() and state.global_step < state.max_steps:
            self.stopping = control.should_save = control.should_training_stop = True

    def leave_if_told(self, state) -> None:
        """Raises Interrupted on all ranks if training ended because of a signal."""
        if self.stopping:
            dist.barrier()  # a launcher ends the others when the first is gone
            raise Interrupted(
                f"interrupted after step {state.global_step} of {state.max_steps}, which is saved; "
                f"go on with: {command('train', '--resume', self.folder)}"
            )
