"""What a training run leaves: its checkpoints and its result, written from a sharded model, and how they come back."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from trl import SFTTrainer

from fitune.config.schema import ADAPTER, Run
from fitune.launching.heartbeat import Heartbeat
from fitune.model.sharding import share_of
from fitune.training.best_model import BestModel
from fitune.training.checkpoint import CheckpointSaver, Writer, disk_errors_named
from fitune.training.distributed import is_main_process, wait_for_all
from fitune.training.manifest import Identity, find_damage
from fitune.training.replicas import refuse_replicas_apart
from fitune.training.result import gathered_result, save_result, write_result
from fitune.training.resumed import follow_this_runs_schedule
from fitune.training.state import load_optimizer_state, load_trainable_weights, training_state, write_training_state
from fitune.weights.base_identity import BaseRecord


class SavingSFTTrainer(SFTTrainer):
    """SFTTrainer whose checkpoints hold each rank's rows, and whose result is gathered tensor by tensor.

    `base_record` is what a trained adapter remembers of its base, `identity` what a checkpoint does; a trainer that
    saves nothing needs neither. `heartbeat` tells the launcher that this rank gets on.
    """

    def __init__(
        self, run: Run, base_record: BaseRecord | None, identity: Identity | None, heartbeat: Heartbeat, **kwargs
    ):
        self.run, self.base_record, self.identity, self.heartbeat = run, base_record, identity, heartbeat
        super().__init__(**kwargs)
        self.share = share_of(run, self.args.process_index)
        self.best_model = BestModel(run.recipe)
        self.add_callback(self.best_model)
        self.saver = CheckpointSaver(run, identity, heartbeat)
        self.add_callback(self.saver)

    def load_best_model(self) -> None:
        """Where `load_best_model_at_end` asks for it, fills in the weights that were best when they were evaluated.

        Call on all ranks.
        """
        if not self.best_model.is_result:
            return
        with self.heartbeat.using_files():
            folder, log_history = Path(self.args.output_dir), self.state.log_history
            best = self.best_model.choose(folder, log_history, lambda path: find_damage(path, self.heartbeat.waiting))
            if best:
                load_trainable_weights(best, self.model, self.share)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or self.run.result_folder)
        with self.heartbeat.using_files():
            refuse_replicas_apart(self.model, self.share, self.state.global_step, self.heartbeat.waiting)
            self._save_result(folder)
            with self.heartbeat.waiting():
                dist.barrier()

    def _save_result(self, folder: Path) -> dict[str, str]:
        return save_result(
            folder, self.run, self.model, self.processing_class, self.base_record, self.heartbeat.waiting
        )

    def _save_checkpoint(self, model, trial) -> None:
        """checkpoints/checkpoint-N; raises FituneError if the disk is full. Call on all ranks."""
        dist.barrier()  # one may have logged to a slow server; it is watched from here on
        refuse_replicas_apart(self.model, self.share, self.state.global_step, self.heartbeat.waiting)
        kept_steps = self.best_model.kept_steps(self.state.log_history)
        is_last = self.control.should_training_stop
        self.saver.save(self.state.global_step, self._prepare_checkpoint, kept_steps, is_last=is_last)

    def _prepare_checkpoint(self, folder: Path, is_copied: bool) -> Writer:
        """Writes the position; returns what writes the adapter and this rank's sharded state.

        `is_copied`: as they are now, whatever training changes meanwhile.
        """
        full = self.run.recipe.method == "full"
        random_state = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        if self.share.replica:  # the first one has the rest
            self._save_position(folder)
            return lambda: {random_state: None}
        state = training_state(self.model, self.optimizer, self.share.shards, weights=full)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # what lies in host RAM may be on its way there
        if is_copied:
            state = state.copied()
        write_adapter = dict if full else self._adapter_writer(folder / ADAPTER, is_copied)
        self._save_position(folder)

        def write() -> dict[str, str | None]:
            hashes = {f"{ADAPTER}/{name}": sha256 for name, sha256 in write_adapter().items()}
            return hashes | write_training_state(folder, state, self.share.shard) | {random_state: None}

        return write

    def _adapter_writer(self, folder: Path, is_copied: bool) -> Callable[[], dict[str, str]]:
        """What writes the adapter: rank 0 alone if all is copied to it now, else all ranks together."""
        if not is_copied:
            return partial(self._save_result, folder)
        tensors = gathered_result(self.model, self.run, self.heartbeat.waiting)
        tensors = [whole.clone() for whole in tensors if whole is not None]  # one rank gathers its own weights
        if not is_main_process():
            return dict
        return partial(write_result, folder, self.run, self.model, self.processing_class, self.base_record, tensors)

    def _save_position(self, folder: Path) -> None:
        """Each rank's random state; the scheduler, step and counters, which are the same on all."""
        with disk_errors_named(folder):
            self._save_rng_state(str(folder))
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
        if self.args.should_save:
            self.state.num_input_tokens_seen = int(self._total_train_tokens)
            self.state.stateful_callbacks["TrainerControl"] = self.control.state()
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        with self.heartbeat.using_files():
            load_trainable_weights(Path(resume_from_checkpoint), self.model, self.share)
            wait_for_all(self.heartbeat.waiting)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is None:
            return
        self._total_train_tokens = self.state.num_input_tokens_seen
        optimizer = self.optimizer.optimizer  # inside accelerate's wrapper
        with self.heartbeat.using_files():
            load_optimizer_state(Path(checkpoint), self.model, optimizer, self.share)
            wait_for_all(self.heartbeat.waiting)  # one machine's disk may be far slower than another's
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        if isinstance(self.lr_scheduler, LambdaLR):
            follow_this_runs_schedule(self.lr_scheduler, self.args.learning_rate)
