"""A resumed run does what it is told now, where transformers would do what the checkpoint remembers."""

from collections.abc import Callable

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback


class AsOftenAsAskedNow(TrainerCallback):
    """A resumed run logs, evaluates and saves as often as it is told now.

    Trainer reckons the steps from its arguments, then puts the checkpoint's over them (transformers 5.23).
    """

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)


class FirstStep(TrainerCallback):
    """Calls `when_trained` once, after the first step of this process, before it is saved."""

    def __init__(self, when_trained: Callable[[], None]):
        self.when_trained: Callable[[], None] | None = when_trained

    def on_step_end(self, args, state, control, **kwargs):
        if self.when_trained:
            self.when_trained()
            self.when_trained = None


def follow_this_runs_schedule(scheduler: LambdaLR, rate: float) -> None:
    """Checkpoints hold the last learning rate and the one it came from; a resumed run may have another schedule."""
    scheduler.base_lrs = [rate] * len(scheduler.base_lrs)
    for group, share in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        group["initial_lr"], group["lr"] = rate, rate * share(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
