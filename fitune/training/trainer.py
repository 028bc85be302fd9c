"""TRL's SFTTrainer over an already sharded model: what a pass is given, what a step waits for, what is logged."""

import math
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy
from trl import SFTConfig

from fitune.config.schema import Run
from fitune.data.dataset import TokenisedRows
from fitune.launching.heartbeat import Heartbeat
from fitune.model.dropout_keys import DROPOUT_KEYS, dropout_keys
from fitune.model.gradient_dtype import keep_gradients_as_computed
from fitune.model.host_embedding import host_embedding
from fitune.model.noise import EmbeddingNoise, lengths_of_examples
from fitune.model.sharding import reshard_whole_weights
from fitune.model.skeleton import decoder
from fitune.optimizers.gradient_norm import ClipsInItsStep, clip_gradients
from fitune.training.arguments import own_optimizer, training_arguments
from fitune.training.bad_rows import refuse_step
from fitune.training.epoch_ends import EpochEnds
from fitune.training.loss import ANSWERS, Answers, add_answer_loss, find_answers
from fitune.training.manifest import Identity
from fitune.training.read_ahead import ReadAhead
from fitune.training.replicas import average_gradients
from fitune.training.resumed import AsOftenAsAskedNow
from fitune.training.saving_trainer import SavingSFTTrainer
from fitune.training.token_metrics import token_metrics
from fitune.training.whole_steps import WholeSteps, count_tokens, in_whole_steps, rows_per_step
from fitune.weights.base_identity import BaseRecord

IDS_IN_HOST_RAM = "ids_in_host_ram"
"Under this name a batch's tokens wait for the embedding that looks them up there."
TOKENS = "tokens"
"Under this name a batch says how many tokens it has, until they are counted."


class ShardedSFTTrainer(SavingSFTTrainer):
    """SFTTrainer that trains a sharded model, and saves it as `SavingSFTTrainer` does.

    `adapters_wait`: each rank adds up its own gradients of the adapters until a step's last micro batch.
    `uncast_gradients`: method full's stay in the dtype that they were computed or added up in. `arguments` are those of
    `training_arguments(run)`, where they were made before the model was loaded.
    """

    def __init__(
        self,
        run: Run,
        base_record: BaseRecord | None = None,
        identity: Identity | None = None,
        heartbeat: Heartbeat | None = None,
        arguments: SFTConfig | None = None,
        *,
        adapters_wait: bool = False,
        uncast_gradients: bool = False,
        train_dataset: TokenisedRows,
        eval_dataset: TokenisedRows | None = None,
        **kwargs,
    ):
        self.adapters_wait = adapters_wait
        self._step: list[tuple[dict, torch.Tensor]] = []  # this step's micro batches with their losses
        self._uncounted_tokens: list[int] = []  # of these micro batches
        self._unlogged: list[torch.Tensor] = []  # (entropy, right answer tokens) by micro batch
        self._unlogged_tokens = 0
        self.read_ahead = ReadAhead(self._read_batches)
        self.also_logged = dict  # returns what a log line of training has beside the loss
        arguments = arguments or training_arguments(run)
        if eval_dataset is None:  # `eval` trains nothing, whenever training evaluates
            arguments.eval_strategy = IntervalStrategy.NO
        super().__init__(
            run,
            base_record,
            identity,
            heartbeat or Heartbeat(),
            args=arguments,
            train_dataset=_stand_in(train_dataset),
            eval_dataset=_stand_in(eval_dataset) if eval_dataset is not None else None,
            optimizer_cls_and_kwargs=own_optimizer(run, arguments),
            **kwargs,
        )
        self.add_callback(self.heartbeat)
        self.add_callback(AsOftenAsAskedNow())
        self.add_callback(EpochEnds())
        add_answer_loss(decoder(self.model))
        if uncast_gradients:
            keep_gradients_as_computed(self.model)
        if run.profile.optimizer_offload:
            decoder(self.model).model.register_forward_hook(self._before_the_loss)
        self.host_embedding = host_embedding(self.model)
        alpha, self.neftune_noise_alpha = self.neftune_noise_alpha, None  # Trainer's own noise depends on the rank
        self.noise = EmbeddingNoise(decoder(self.model).model.embed_tokens, alpha) if alpha else None
        batch, pad = run.recipe.global_batch_size, self.processing_class.pad_token_id
        self.train_dataset = train_dataset.filled_up(batch, pad, one_more=rows_per_step(run) > batch)
        if eval_dataset is not None:
            rows_a_pass = self.args.per_device_eval_batch_size * self.args.world_size
            self.eval_dataset = eval_dataset.filled_up(rows_a_pass, pad)

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """Also has gradients go by the optimizer's list.

        The model's own `zero_grad` looks for them in all its modules: 5 ms for 8B with adapters (one core, by hand),
        which the GPU waits for.
        """
        optimizer = super().create_optimizer(*args, **kwargs)
        self.model.zero_grad = optimizer.zero_grad
        return optimizer

    def _get_train_sampler(self, train_dataset=None):
        self._order = in_whole_steps(super()._get_train_sampler(train_dataset), self.run)
        return self._order

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        if isinstance(self._order, WholeSteps):
            loader.set_sampler(self._order)  # where the loader of a resumed epoch looks for what it tells the epoch
        return loader

    def training_step(self, model, inputs, *args, **kwargs):
        self.heartbeat.count()
        if self._units:
            self._leave_gradients_to_the_last_pass(model)
        if self.host_embedding:
            self.host_embedding.expect(inputs.pop(IDS_IN_HOST_RAM))
        inputs = self._with_random_numbers(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.accelerator.sync_gradients:
            average_gradients(model)
        self._step.append((inputs, loss))
        return loss

    def _leave_gradients_to_the_last_pass(self, model: nn.Module) -> None:
        """Gradients stay on the GPU until the last micro batch of a step, where that saves more than it takes.

        With one rank an adapter's are whole anyway; several ranks keep theirs whole where there is room, and reduce
        them once. Offloaded, each micro batch would else wait for its gradients to be added up in host RAM, layer by
        layer. Between copies of the model they travel only then; method full's wait on the GPU only if they live
        there.
        """
        is_last, full = self.accelerator.sync_gradients, self.run.recipe.method == "full"
        for layer in self._layers_that_stay(model):
            layer.set_reshard_after_backward(is_last, recurse=False)
        leave_the_gpu = self.run.accelerate.offload_params or self.run.profile.optimizer_offload
        for unit in self._units:
            if self.adapters_wait or (self.args.world_size == 1 and not full):
                unit.set_requires_gradient_sync(is_last, recurse=False)
            elif self.run.replicas > 1 and not (full and leave_the_gpu):
                unit.set_requires_all_reduce(is_last, recurse=False)

    def _layers_that_stay(self, model: nn.Module) -> list[FSDPModule]:
        """Whole on the GPU from one pass of a step to the next: weights change only then.

        All of method full that are kept gathered; of one rank the first, with which the next pass begins as this ends.
        """
        layers = decoder(model).model.layers
        if self.run.recipe.method == "full":
            return list(layers) if self.run.accelerate.keeps_gathered else []
        return list(layers[:1]) if self.run.shards == 1 else []

    @cached_property
    def _units(self) -> list[FSDPModule]:
        """FSDP's. To look for them among all modules in each pass took 10 ms for 70B (one core, by hand)."""
        return [module for module in self.model.modules() if isinstance(module, FSDPModule)]

    def _sync_replicated_trainable_parameters(self, model) -> None:
        """Nothing: ranks with whole copies start from equal weights, and `average_gradients` travels with many at once.

        Trainer's hooks stop the GPU for each tensor, of which 8B's adapters have 448.
        """

    def _before_the_loss(self, *_) -> None:
        """Memory is shortest while the loss goes backward; the layers' forward has hidden what was on its way out."""
        if self.model.training:
            self.optimizer.optimizer.let_gradients_go()  # inside accelerate's wrapper

    def _with_random_numbers(self, inputs: dict) -> dict:
        """What dropout and noise draw in this pass, the same wherever its examples lie."""
        has_dropout = bool(self.run.recipe.lora and self.run.recipe.lora.dropout)
        if not (has_dropout or self.noise):
            return inputs
        inputs = self._prepare_inputs(inputs)
        batch = inputs["input_ids"], inputs.get("cu_seq_lens_q"), inputs.get("attention_mask")
        keys = dropout_keys(*batch, self.run.recipe.seed, self.state.global_step)
        if has_dropout:
            inputs[DROPOUT_KEYS] = keys
        if self.noise:
            self.noise.prepare(keys, lengths_of_examples(*batch))
        return inputs

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return self.read_ahead.take(epoch_iterator, num_batches, device)

    def _read_batches(self, epoch_iterator, num_batches, device):
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            labels = batch["labels"].cpu()
            batch[ANSWERS] = find_answers(labels).to(batch["labels"].device)
            batch[TOKENS] = count_tokens(batch, labels)
            if self.host_embedding:
                batch[IDS_IN_HOST_RAM] = batch["input_ids"].cpu()
        return batches, items

    def _read_next_batches(self) -> None:
        """Those of the next step, if it is in this epoch and will be trained."""
        is_last = self.state.global_step + 1 >= self.state.max_steps
        if not (is_last or self.accelerator.gradient_state.end_of_dataloader):
            self.read_ahead.read_next()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss of training, without asking the GPU for numbers: Python goes on while it computes.

        What TRL logs beside the loss is summed up on the GPU and read in `log`.
        """
        counted = inputs.pop(TOKENS, None)
        plain = self.label_smoother is None and self.compute_loss_func is None and self.args.loss_type == "nll"
        if not plain or ANSWERS not in inputs or return_outputs or num_items_in_batch is None:
            options = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
            return self._trls_loss(model, inputs, inputs.pop(ANSWERS, None), counted, **options)
        sums = model(**inputs, use_cache=False)
        self._unlogged.append(torch.stack([sums.entropy, sums.right.to(sums.entropy)]))
        self._unlogged_tokens += len(inputs[ANSWERS].tokens)
        self._uncounted_tokens.append(counted)
        loss = sums.loss / num_items_in_batch.clamp(min=1)
        return loss * self.accelerator.num_processes if self.args.average_tokens_across_devices else loss

    def _trls_loss(self, model, inputs, answers: Answers | None, tokens: int | None, **options):
        """TRL's own. What it would log counts rows that fill up a step, and not all ranks of an epoch's last pass."""
        counted_before = self._total_train_tokens

        def watched(**kwargs):
            outputs = model(**kwargs)
            if answers and (entropy := getattr(outputs, "entropy", None)) is not None:
                sums = entropy.detach().sum(), outputs.is_top1.sum()
                self._unlogged.append(torch.stack([number.double() for number in sums]))
            return outputs

        loss = super().compute_loss(watched, inputs, **options)
        if answers:
            self._total_train_tokens = counted_before
            self._unlogged_tokens += len(answers.tokens)
            self._uncounted_tokens.append(tokens)
        return loss

    def floating_point_ops(self, inputs: dict) -> int:
        """As transformers estimates them, whose count of the parameters goes through all modules: here once."""
        return 6 * inputs["input_ids"].numel() * self._parameters

    @cached_property
    def _parameters(self) -> int:
        return self.model.num_parameters(exclude_embeddings=True)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._unlogged and self.model.training:
            sums = torch.stack(self._unlogged).sum(0).tolist()
            over_all_ranks = torch.tensor([self._unlogged_tokens, *sums], dtype=torch.float64)
            dist.all_reduce(over_all_ranks)
            tokens, entropy, right = over_all_ranks.tolist()
            self._unlogged.clear()
            self._unlogged_tokens = 0
            means = {"entropy": entropy / max(tokens, 1), "mean_token_accuracy": right / max(tokens, 1)}
            self._metrics["train"] |= {name: [mean] for name, mean in means.items()}
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        super().log(logs | (self.also_logged() if "loss" in logs else {}), start_time)

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs):
        """The numbers of `eval`, in place of Trainer's mean of batch means."""
        self.callback_handler.eval_dataloader = dataloader

        def on_pass() -> None:
            self.heartbeat.count()
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

        metrics = token_metrics(self.model, dataloader, on_pass)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(None, None, named, num_samples=len(dataloader.dataset))

    def _clip_grad_norm(self, model, max_norm: float | None = None):
        optimizer = self.optimizer.optimizer  # inside accelerate's wrapper
        max_norm = self.args.max_grad_norm if max_norm is None else max_norm
        clips_itself = isinstance(optimizer, ClipsInItsStep)
        return optimizer.clip(max_norm) if clips_itself else clip_gradients(model.parameters(), max_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm over all ranks, asked for just before the optimizer step: the last moment to refuse a bad one."""
        self._read_next_batches()
        norm = self._clip_grad_norm(model, math.inf) if grad_norm is None else grad_norm
        bad = not (math.isfinite(norm) and torch.stack([loss for _, loss in self._step]).isfinite().all())
        over_all_ranks = torch.tensor([bad, sum(self._uncounted_tokens)], dtype=torch.float64)
        dist.all_reduce(over_all_ranks)
        if over_all_ranks[0]:
            self.heartbeat.rest()  # all tokens are read
            tokens, rows = self.train_dataset.tokens, Path(self.run.recipe.data.prepared) / "train.jsonl"
            refuse_step(self.state.global_step + 1, float(norm), self._step, tokens, rows)
        self._total_train_tokens += int(over_all_ranks[1])
        self._uncounted_tokens.clear()
        self._step.clear()
        return norm

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        dist.barrier()  # see _save_checkpoint
        with self.heartbeat.evaluating():
            metrics = super().evaluate(*args, **kwargs)
        reshard_whole_weights(self.model)
        return metrics


def _stand_in(rows: TokenisedRows) -> Dataset:
    """The first of `rows`, where TRL asks for one of `datasets`' own; what is trained on takes its place after that."""
    return Dataset.from_list([rows[0]])
