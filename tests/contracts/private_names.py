"""Every private name of torch, transformers, TRL, PEFT and accelerate that fitune/ uses: which, where, why, until when.

A release may change such a name without a word. `test_private_names.py` fails with the name when an installed release
did, and when fitune/ uses one that is not listed here. A name is written `module:path`; the path's last part may be an
attribute that only instances have.
"""

from dataclasses import dataclass

FSDP = "torch.distributed.fsdp._fully_shard"
PARAM, GROUP = f"{FSDP}._fsdp_param:FSDPParam", f"{FSDP}._fsdp_param_group:FSDPParamGroup"
UNIT, HF = f"{FSDP}._fully_shard:FSDPModule", "transformers:Trainer"
GRADIENTS, SUMS = "model/gradient_dtype.py", "model/copies.py"
SHARDING, ONE_RANK, SKELETON = "model/sharding.py", "model/one_rank.py", "model/skeleton.py"
TRAINER, SAVING, ATTENTION = "training/trainer.py", "training/saving_trainer.py", "model/attention.py"
NEVER = "Trainer has a public way to write and read checkpoints of one's own"
PADDING = "FSDP2 has a public way to load a shard that is shorter than the others without copying it"
ORDER = "FSDP2 does not keep the order of a forward pass that nothing is to follow"
IN_RAM = "DTensor.from_local leaves rows where they lie"
FLASH = "torch.nn.attention.varlen gives out what its backward pass needs"
CAST = "FSDP2 lets reduced gradients stay in the dtype that they were reduced in"
FEW_SUMS = "FSDP2 lets go of what copies of the model have added up before the backward pass ends"
COPIES = "FSDP2 does for one rank what it does for several: no copies of what is on the GPU, prefetching of the rest"


@dataclass(frozen=True)
class PrivateName:
    name: str
    used_by: tuple[str, ...]
    "Files, from fitune/ on."
    why: str
    until: str
    "What would make the use needless."
    parameters: tuple[str, ...] | None = None
    "Of a function or class that fitune calls or overrides: the parameters it relies on, in this order."
    called_as: str | None = None
    "Text that the library's module must have, where fitune relies on the library to call or to read the name."

    @property
    def library(self) -> str:
        return self.name.partition(".")[0].partition(":")[0]

    @property
    def last(self) -> str:
        """What stands in fitune's code."""
        return self.name.replace(":", ".").rpartition(".")[2]


PRIVATE_NAMES = (
    # torch: FSDP2's parameter groups
    PrivateName(PARAM, (SHARDING, ONE_RANK), "to fill and pad the shards that FSDP keeps", PADDING),
    PrivateName(GROUP, (SHARDING, ONE_RANK, GRADIENTS, SUMS), "the parameters that are gathered together", PADDING),
    PrivateName(f"{UNIT}._get_fsdp_state", (SHARDING,), "from a unit to its group", PADDING,
                parameters=()),
    PrivateName(f"{FSDP}._fsdp_state:FSDPState._fsdp_param_group", (SHARDING,), "from a unit to its group",
                PADDING),
    PrivateName(f"{FSDP}._fsdp_state:FSDPState._modules_to_run_forward", (SHARDING,),
                "torch 2.11 warns that the head did not run, which the loss never calls",
                "torch below 2.13 is no longer supported"),
    PrivateName(f"{GROUP}.fsdp_params", (SHARDING, ONE_RANK, GRADIENTS), "from a group to its parameters", PADDING),
    PrivateName(f"{PARAM}._module_info", (SHARDING, ONE_RANK), "which module's parameter it is", PADDING),
    PrivateName(f"{PARAM}.padded_sharded_param_size", (SHARDING,), "the size that is gathered", PADDING),
    PrivateName(f"{PARAM}._sharded_param_data", (SHARDING, ONE_RANK), "what is gathered",
                PADDING),
    PrivateName("torch.distributed.tensor:DTensor._local_tensor", (SHARDING, ONE_RANK), "rows of the padded shard",
                PADDING),
    PrivateName("torch.distributed.tensor._dtensor_spec:DTensorSpec", (SHARDING,),
                "rows in host RAM as a DTensor of a mesh of GPUs", IN_RAM),
    PrivateName("torch.distributed.tensor._dtensor_spec:TensorMeta", (SHARDING,),
                "shape, stride and dtype of such a DTensor", IN_RAM, parameters=("shape", "stride", "dtype")),
    PrivateName(f"{UNIT}._set_unshard_async_op", (SHARDING,),
                "embedding and head are gathered on the stream that computes, whose memory it can use again",
                "FSDP2 lets a unit choose its stream in public", parameters=("async_op",)),
    PrivateName(f"{GROUP}.__class__", (ONE_RANK, GRADIENTS, SUMS), "swapped for a class of ours", COPIES),
    PrivateName(f"{GROUP}._init_mp_dtypes", (GRADIENTS,), "overridden", CAST, parameters=(),
                called_as="self._init_mp_dtypes()"),
    PrivateName(f"{GROUP}._orig_dtype", (GRADIENTS,), "what reduced gradients are cast to; None: nothing", CAST,
                called_as="self._orig_dtype,"),
    PrivateName(f"{GROUP}.unshard", (ONE_RANK,), "overridden", COPIES, parameters=("async_op",),
                called_as="self.unshard("),
    PrivateName(f"{GROUP}.wait_for_unshard", (ONE_RANK,), "overridden", COPIES, parameters=(),
                called_as="self.wait_for_unshard("),
    PrivateName(f"{GROUP}._all_reduce_state", (SUMS,), "what holds the sums", FEW_SUMS,
                called_as="self._all_reduce_state = None"),
    PrivateName(f"{GROUP}._post_reduce_event", (SUMS,), "when they have arrived", FEW_SUMS,
                called_as="wait_event(self._post_reduce_event)"),
    PrivateName(f"{FSDP}._fsdp_param_group:FSDPCommContext.reduce_scatter_stream", (SUMS,), "whose memory they are",
                FEW_SUMS),
    PrivateName(f"{GROUP}.post_backward", (ONE_RANK, SUMS), "overridden", COPIES, parameters=("unused",),
                called_as=".post_backward()"),
    PrivateName(f"{GROUP}.mesh_info", (ONE_RANK,), "whether there are other copies of the model", COPIES),
    PrivateName(f"{FSDP}._fsdp_common:HSDPMeshInfo", (ONE_RANK,), "see mesh_info", COPIES),
    PrivateName(f"{GROUP}.reduce_grads", (ONE_RANK,), "whether gradients wait for the last pass", COPIES),
    PrivateName(f"{GROUP}.reshard_after_backward", (ONE_RANK,), "whether weights stay for the next pass", COPIES),
    PrivateName(f"{GROUP}.reshard", (ONE_RANK,), "frees weights", COPIES, parameters=()),
    PrivateName("torch:Tensor._post_accumulate_grad_hooks", (ONE_RANK,), "called, as FSDP does, for a stored weight",
                COPIES),
    PrivateName(f"{GROUP}._training_state", (ONE_RANK,), "whether it is the backward pass", COPIES),
    PrivateName(f"{FSDP}._fsdp_common:TrainingState.PRE_BACKWARD", (ONE_RANK,), "see _training_state", COPIES),
    PrivateName(f"{FSDP}._fsdp_param_group:TrainingState", (ONE_RANK,), "see _training_state", COPIES),
    PrivateName(f"{GROUP}._all_gather_result", (ONE_RANK,), "that copies are under way", COPIES),
    PrivateName(f"{GROUP}._to_sharded", (SHARDING,), "frees what an evaluation left gathered",
                "FSDPModule.reshard frees the unit of norm and head, as it does from torch 2.13 on", parameters=()),
    PrivateName(f"{GROUP}._post_forward_indices", (SHARDING,), "emptied after an evaluation, see post_forward_order",
                ORDER),
    PrivateName(f"{FSDP}._fsdp_param_group:FSDPCommContext.post_forward_order", (SHARDING,),
                "emptied after an evaluation, or the next backward pass gathers the head once more", ORDER),
    PrivateName(f"{GROUP}._to_unsharded", (ONE_RANK,), "that they have arrived", COPIES, parameters=()),
    PrivateName(f"{GROUP}.is_unsharded", (ONE_RANK,), "that nothing is to be copied", COPIES),
    PrivateName(f"{GROUP}.unshard_in_backward", (ONE_RANK,), "the embedding is not needed there", COPIES),
    PrivateName(f"{GROUP}.comm_ctx", (ONE_RANK, SUMS), "its streams", COPIES),
    PrivateName(f"{FSDP}._fsdp_param_group:FSDPCommContext.all_gather_copy_in_stream", (ONE_RANK,),
                "the stream for copies", COPIES),
    PrivateName(f"{GROUP}.device", (ONE_RANK,), "where it computes", COPIES),
    PrivateName(f"{GROUP}.device_handle", (ONE_RANK,), "streams and events of that device", COPIES),
    PrivateName(f"{FSDP}._fsdp_collectives:AllGatherResult", (ONE_RANK,), "what FSDP waits for", COPIES,
                parameters=("all_gather_output", "all_gather_event", "all_gather_work", "param_all_gather_input_dtypes",
                            "param_all_gather_input_numels", "all_gather_input_split_sizes")),
    PrivateName(f"{FSDP}._fsdp_param:alloc_storage", (ONE_RANK,), "memory for a copy", COPIES,
                parameters=("tensor",)),
    PrivateName(f"{PARAM}.all_gather_outputs", (ONE_RANK,), "where a copy goes", COPIES),
    PrivateName(f"{PARAM}._unsharded_param", (ONE_RANK,), "whether a weight is in place already", COPIES),
    PrivateName(f"{PARAM}.init_unsharded_param", (ONE_RANK,), "the parameter that a layer sees", COPIES,
                parameters=()),
    PrivateName(f"{PARAM}.offload_to_cpu", (ONE_RANK,), "whether a weight must travel", COPIES),
    PrivateName(f"{PARAM}.param_dtype", (ONE_RANK,), "whether it is cast on the way", COPIES),
    PrivateName(f"{PARAM}.orig_dtype", (ONE_RANK,), "whether it is cast on the way", COPIES),
    PrivateName("torch.autograd:_unsafe_preserve_version_counter", (ONE_RANK,),
                "a copy into a weight is no change of it, as in FSDP's own code", COPIES, parameters=("tensors",)),
    # torch: the rest
    PrivateName("torch:ops.aten._flash_attention_forward", (ATTENTION,), "attention of packed rows inside one autograd "
                "function for the whole layer", FLASH,
                parameters=("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p",
                            "is_causal", "return_debug_mask", "scale")),
    PrivateName("torch:ops.aten._flash_attention_backward", (ATTENTION,), "its gradients", FLASH,
                parameters=("grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q",
                            "max_k", "dropout_p", "is_causal", "rng_state", "unused", "scale")),
    PrivateName("torch:ops.aten._scaled_dot_product_cudnn_attention", (ATTENTION,), "the same of examples of one "
                "length", FLASH, parameters=("query", "key", "value", "attn_bias", "compute_log_sumexp", "scale")),
    PrivateName("torch:ops.aten._scaled_dot_product_cudnn_attention_backward", (ATTENTION,), "its gradients", FLASH,
                parameters=("grad_out", "query", "key", "value", "out", "logsumexp", "philox_seed", "philox_offset",
                            "attn_bias", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal",
                            "scale")),
    PrivateName("torch:_scaled_mm", ("model/fp8_rounding.py",), "products of e4m3 rows, a scale for each",
                "torch.nn.functional.scaled_mm, public since 2.10, writes into a given tensor"),
    PrivateName("torch.distributed.distributed_c10d:_get_default_store", ("training/distributed.py",),
                "a counter of all ranks that works while collectives hang: who failed first says why",
                "torch gives out the default group's store in public", parameters=()),
    PrivateName("torch.optim.lr_scheduler:LRScheduler._last_lr", ("training/resumed.py",),
                "a resumed run that has another schedule logs its own rate",
                "a scheduler can be told its step and recompute its rates"),
    PrivateName("torch.optim:Adam._init_group", ("optimizers/adamw_rows.py", "optimizers/adamw_streamed.py"),
                "what a step works on: each rank's own rows in place of DTensors", "a step of DTensors takes no longer",
                parameters=("group", "params_with_grad", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs",
                            "state_steps"), called_as="has_complex = self._init_group("),
    PrivateName("torch:_foreach_copy_", ("optimizers/adamw_streamed.py", ONE_RANK),
                "many copies by one call of Python's", "torch has it in public, for plain tensors"),
    PrivateName("torch:_foreach_add_", (ONE_RANK,), "a layer's gradients to earlier ones by one call of Python's",
                "torch has it in public, for plain tensors"),
    PrivateName("torch:_foreach_norm", ("optimizers/gradient_norm.py",), "norms in another dtype by few kernels",
                "torch.nn.utils.get_total_norm takes a dtype"),
    PrivateName("torch:_foreach_mul_", ("optimizers/gradient_norm.py",), "scales all gradients by one kernel",
                "torch has it in public, for plain tensors"),
    # transformers
    PrivateName(f"{HF}._get_grad_norm", (TRAINER,),
                "the last moment before the optimizer's step", "Trainer has a callback between gradients and step",
                parameters=("model", "grad_norm"), called_as="self._get_grad_norm(model, grad_norm=grad_norm)"),
    PrivateName(f"{HF}._clip_grad_norm", (TRAINER,),
                "on each rank's own rows; 8-bit AdamW without rounding gradients again",
                "Trainer asks the optimizer to clip, and torch clips DTensors as fast as tensors",
                parameters=("model",), called_as="grad_norm = self._clip_grad_norm(model)"),
    PrivateName(f"{HF}._get_train_sampler", (TRAINER,),
                "filler rows at the end of each step, not of the epoch", "Trainer takes a sampler",
                parameters=("train_dataset",), called_as="sampler_fn=self._get_train_sampler"),
    PrivateName(f"{HF}._save_checkpoint", (SAVING,), "each rank saves its own rows", NEVER,
                parameters=("model", "trial"), called_as="self._save_checkpoint(model, trial)"),
    PrivateName(f"{HF}.save_model", (SAVING,), "its second parameter is private", NEVER,
                parameters=("output_dir", "_internal_call")),
    PrivateName(f"{HF}._save_rng_state", (SAVING,), "written beside the sharded state", NEVER,
                parameters=("output_dir",)),
    PrivateName(f"{HF}._load_from_checkpoint", (SAVING,), "each rank loads its own rows", NEVER,
                parameters=("resume_from_checkpoint", "model"), called_as="self._load_from_checkpoint("),
    PrivateName(f"{HF}._load_optimizer_and_scheduler", (SAVING,),
                "each rank loads its own rows", NEVER, parameters=("checkpoint",),
                called_as="self._load_optimizer_and_scheduler(resume_from_checkpoint)"),
    PrivateName("transformers.distributed.mixin:DistributedMixin._is_distributed_loading_by_transformers", (SHARDING,),
                "set, so that Trainer neither moves nor wraps the sharded model",
                "Trainer leaves alone what is sharded already",
                called_as="return self._is_distributed_loading_by_transformers"),
    PrivateName("transformers.distributed.fsdp:_is_fsdp_managed_module", (SHARDING,),
                "set, so that transformers knows a sharded model", "transformers asks torch for FSDPModule",
                called_as='getattr(module, "_is_fsdp_managed_module", False)'),
    PrivateName(f"{HF}._prepare_inputs", (TRAINER,), "a batch on its device before dropout's keys are made of it",
                "Trainer has a callback with the batch before the forward pass", parameters=("inputs",)),
    PrivateName("transformers.models.llama.modeling_llama:LlamaForCausalLM.__class__", (SHARDING,),
                "swapped for one whose device is that of the computation", "generate takes a device"),
    PrivateName("torch.nn:Embedding.__class__", ("model/host_embedding.py",),
                "swapped for one that looks up in host RAM", "FSDP2 leaves a parameter where it is if asked"),
    PrivateName("transformers.models.llama.modeling_llama:LlamaDecoderLayer.__class__", ("model/layer.py",),
                "swapped for the layer written out", "transformers has an interface for a layer of one's own"),
    # TRL
    PrivateName("trl:SFTTrainer._total_train_tokens", (TRAINER, SAVING, "training/train.py"),
                "a resumed run goes on counting, and tokens per second are measured by it",
                "TRL keeps num_input_tokens_seen in TrainerState"),
    PrivateName("trl:SFTTrainer._metrics", (TRAINER,), "entropy and accuracy are logged with what TRL logs",
                "TRL logs what a callback gives it"),
    PrivateName("trl.trainer.base_config:_BaseConfig", ("config/installed_names.py",),
                "SFTConfig's fields are read from its source, so that no command imports TRL for them",
                "TRL's configs can be imported without torch"),
    # PEFT
    PrivateName("peft.tuners.trainable_tokens:TrainableTokensLayer.__class__", (SKELETON,),
                "swapped for a layer that does not copy the whole embedding (2 GiB at 70B)",
                "PEFT replaces only the rows that are looked up"),
    PrivateName("peft.tuners.lora.layer:LoraLayer.lora_A.__class__", (SKELETON,),
                "swapped for a linear that is cast for the product; PEFT would cast the activations to float32",
                "PEFT can keep float32 adapters under bf16 activations without autocast"),
)  # fmt: skip
"accelerate is not among them: fitune calls its launcher and reads the source of its public config classes."
