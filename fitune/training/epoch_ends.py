"""What is due at an epoch's end is done with its last step, as all else that is due after a step."""

from transformers import TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback


class EpochEnds(TrainerCallback):
    """Logs, evaluates and saves after an epoch's last step what Trainer would once the step is over.

    So a checkpoint of that step holds what the evaluation changed: learning rate, best model, early stopping. And where
    a signal ends training within an epoch, Trainer does not evaluate as if the epoch were over.
    """

    def on_step_end(self, args, state, control, **kwargs):
        if state.epoch.is_integer() or state.global_step >= state.max_steps:
            DefaultFlowCallback().on_epoch_end(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_log = control.should_evaluate = control.should_save = False
