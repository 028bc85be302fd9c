"""How the model is spread over the processes: FSDP2's `fully_shard`, unit by unit.

All ranks hold one copy of the model between them, or each of `replicas` groups of them holds one: then weights are
gathered inside a group, and only gradients travel between groups. Ranks of a group follow one another, as those of a
machine do. Where each rank holds a whole copy of a frozen base, FSDP has nothing to do: `fitune.training.replicas`.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from fitune.config.schema import Run
from fitune.errors import FituneError
from fitune.model.copies import hold_few_sums
from fitune.model.fp8_linear import FP8Linear
from fitune.model.host_embedding import leave_in_host_ram
from fitune.model.nf4 import NF4Linear
from fitune.model.one_rank import use_weights_in_place
from fitune.model.skeleton import decoder, is_tied

REPLICATE, SHARD = "replicate", "shard"
"The dimensions of a mesh of several copies."


@dataclass(frozen=True)
class Share:
    """What a rank holds: part number `shard` of `shards` of every parameter, in copy number `replica` of the model."""

    shard: int
    shards: int
    replica: int = 0


def share_of(run: Run, rank: int) -> Share:
    return Share(rank % run.shards, run.shards, rank // run.shards)


def new_mesh(kind: str, run: Run, **options) -> DeviceMesh:
    """Over all processes: [ranks], or [replicas, shards] with several copies. `kind`: cpu or cuda."""
    if run.replicas == 1:
        return init_device_mesh(kind, (run.shards,))
    return init_device_mesh(kind, (run.replicas, run.shards), mesh_dim_names=(REPLICATE, SHARD), **options)


def shard_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Of the ranks that hold one copy of the model with this one."""
    return mesh[SHARD] if mesh.ndim > 1 else mesh


def ranks_of_a_copy(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The ranks that hold one copy of the model between them, this one among them."""
    return shard_mesh(mesh).get_group() if mesh.ndim > 1 else dist.group.WORLD


def shard_group(parameter: torch.Tensor) -> dist.ProcessGroup | None:
    """The ranks that hold the parameter between them; None where nothing is sharded."""
    return ranks_of_a_copy(parameter.device_mesh) if isinstance(parameter, DTensor) else None


def shard(
    model: nn.Module, mesh: DeviceMesh, run: Run, compute_dtype: torch.dtype, *, keep_gathered: bool = False
) -> None:
    """Turns every parameter into a DTensor split along dimension 0, in place. The model must still be on meta.

    One unit per decoder layer: while a layer computes, its weights and the next layer's are gathered, no more, unless
    `keep_gathered` has them stay for the backward pass. Where nothing has to travel, such as all weights on one GPU,
    FSDP is not used and parameters stay plain tensors.
    """
    causal_lm = decoder(model)
    _tell_transformers(causal_lm)
    if not _something_travels(mesh, run, compute_dtype):
        return
    options = {"mesh": mesh, "mp_policy": _mixed_precision(model, run, compute_dtype)}
    in_host_ram = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    everything = in_host_ram if run.accelerate.offload_params else OffloadPolicy()
    embeddings = in_host_ram if run.profile.embedding_offload else everything
    for layer in causal_lm.model.layers:
        fully_shard(layer, reshard_after_forward=not keep_gathered, offload_policy=everything, **options)
    if _looks_up_in_host_ram(mesh, run):
        leave_in_host_ram(causal_lm.model.embed_tokens)
    # One tensor for both is needed from the first moment to the last: the whole model's unit keeps it gathered.
    if not is_tied(causal_lm):
        _shard_embedding_and_head(causal_lm, offload_policy=embeddings, **options)
    fully_shard(model, offload_policy=everything, **options)
    if not is_tied(causal_lm):
        model.register_forward_hook(lambda *_: _count_head_as_run(causal_lm.model.norm))
    if shard_mesh(mesh).size() == 1:
        use_weights_in_place(parameter_groups(model))
        _prefetch_in_order([model, *causal_lm.model.layers])
    elif keep_gathered and not is_tied(causal_lm):
        _prefetch_in_order([causal_lm.model.embed_tokens, *causal_lm.model.layers, causal_lm.model.norm])
    if run.replicas > 1 and shard_mesh(mesh).size() > 1:
        hold_few_sums(parameter_groups(model))
    _check_gathered_as_bytes(model)


def _shard_embedding_and_head(causal_lm: nn.Module, **options) -> None:
    # 2 GiB at 70B and needed once per forward: its own unit, freed at once, not gathered for its gradient.
    embedding = causal_lm.model.embed_tokens
    fully_shard(embedding, reshard_after_forward=True, **options)
    embedding.set_unshard_in_backward(False)
    # The loss multiplies by lm_head.weight without calling the module, so gathering hangs on the norm just before it;
    # the weights stay until the backward pass, which starts with them.
    fully_shard([causal_lm.model.norm, causal_lm.lm_head], reshard_after_forward=False, **options)
    for unit in (embedding, causal_lm.model.norm):
        # Gathered with nothing to overlap with. Else their buffers would come from another stream's memory, which
        # computing can't reuse, and FSDP would keep the head's through the loss.
        unit._set_unshard_async_op(True)


def _prefetch_in_order(units: list[FSDPModule]) -> None:
    """Each unit's forward starts with asking for the next one's weights, from host RAM or other GPUs.

    FSDP itself gathers a unit when Python comes to it, which is late where products are faster than Python: in fp8.
    Backward it asks for the unit before.
    """
    for unit, following in pairwise(units):
        unit.set_modules_to_forward_prefetch([following])


def trained_dtype(run: Run) -> torch.dtype:
    """Of method full's weights as they are kept."""
    return torch.bfloat16 if run.profile.optimizer_state == "bf16_8bit" else torch.float32


def _something_travels(mesh: DeviceMesh, run: Run, compute_dtype: torch.dtype) -> bool:
    """Between ranks of a copy, from host RAM, or from float32 master weights to the dtype of the computation.

    So do all gradients of method full between copies; those of adapters are few, and added up once a step.
    """
    stay_in_bf16 = trained_dtype(run) == compute_dtype == torch.bfloat16
    full_travels = run.recipe.method == "full" and (run.replicas > 1 or not stay_in_bf16)
    return shard_mesh(mesh).size() > 1 or run.embedding_in_ram or full_travels


def _looks_up_in_host_ram(mesh: DeviceMesh, run: Run) -> bool:
    """Whether a rank has the whole embedding in its host RAM, frozen: FSDP need not gather it."""
    return run.embedding_in_ram and run.recipe.method != "full" and shard_mesh(mesh).size() == 1


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a parameter or its optimizer state; all of it where nothing is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def split_as(like: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """This rank's `rows` as a tensor that is split like `like`, where they lie; the rows where nothing is sharded.

    `DTensor.from_local` would bring rows in host RAM to the GPU, which is the mesh's device.
    """
    if not isinstance(like, DTensor):
        return rows
    whole = TensorMeta(like.shape, like.stride(), rows.dtype)
    return DTensor(rows, DTensorSpec(like.device_mesh, like.placements, tensor_meta=whole), requires_grad=False)


def _count_head_as_run(norm: FSDPModule) -> None:
    """Tells FSDP that the unit of norm and head is through, whose head the loss never calls.

    torch 2.11 else warns in every run that a module did not run before backward, whose gathering may be missing. It is
    not: the norm gathered both, they stay until backward, and backward starts with them. To be removed with torch
    below 2.13, which completes such units by itself.
    """
    norm._get_fsdp_state()._modules_to_run_forward.clear()


def reshard_whole_weights(model: nn.Module) -> None:
    """Frees what a forward pass left gathered for a backward pass that never came, as in an evaluation.

    The head's parameters, trained by method full, would else be whole when they are saved. torch 2.11's own `reshard`
    does nothing for the unit of norm and head, which it takes to be in its forward pass still. FSDP forgets the order
    of the units, too: the next backward pass would else end by gathering the head, which came last before it.
    """
    for group in parameter_groups(model):
        group._to_sharded()
        group._post_forward_indices.clear()
        group.comm_ctx.post_forward_order.clear()


def kept_in_host_ram(model: nn.Module, run: Run) -> set[nn.Module]:
    """The modules whose own parameters are offloaded, after `shard`'s plan."""
    if run.accelerate.offload_params:
        return set(model.modules())
    backbone = decoder(model).model
    offloaded = [backbone.embed_tokens, backbone.norm, decoder(model).lm_head] if run.profile.embedding_offload else []
    return {module for unit in offloaded for module in unit.modules()}


def _mixed_precision(model: nn.Module, run: Run, compute_dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Full fine-tuning gathers its weights in `compute_dtype` and adds up the ranks' gradients as the profile says.

    No output is cast: each unit's has the dtype it computes in, and the loss, summed up in float32, must keep it.
    With a frozen base nothing is cast on the way: weights are stored as they are used, and a parameter group of mixed
    dtypes (base and float32 LoRA) is gathered as bytes, so that packed NF4 and fp8 arrive bit for bit.
    """
    frozen_base = any(not parameter.requires_grad for parameter in model.parameters())
    kept_as_computed = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    if frozen_base or (kept_as_computed and compute_dtype == torch.float32):
        return MixedPrecisionPolicy()
    reduce_dtype = torch.bfloat16 if run.reduces_in_bf16 else torch.float32
    return MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype)


def _check_gathered_as_bytes(model: nn.Module) -> None:
    """Refuses a layer whose NF4 or fp8 weights would be gathered as floats on a GPU (bitsandbytes#1945)."""
    for name, layer in model.named_modules():
        if not isinstance(layer, FSDPModule) or not any(isinstance(m, NF4Linear | FP8Linear) for m in layer.modules()):
            continue
        dtypes = {p.dtype for p in group_parameters(layer)}
        on_gpu = any(p.device_mesh.device_type == "cuda" for p in group_parameters(layer))
        if on_gpu and len(dtypes) == 1:
            raise FituneError(f"{name}: all parameters are {dtypes.pop()}; its weights would be gathered as floats")


def group_parameters(unit: nn.Module) -> list[DTensor]:
    """The parameters gathered together when `unit`, one of FSDP's units, runs: all below it but for nested units."""
    nested = {id(p) for m in unit.modules() if m is not unit and isinstance(m, FSDPModule) for p in m.parameters()}
    return [p for p in unit.parameters() if id(p) not in nested]


def parameter_groups(model: nn.Module) -> list[FSDPParamGroup]:
    """Of all FSDP's units that have one."""
    units = (module for module in model.modules() if isinstance(module, FSDPModule))
    return [group for unit in units if (group := unit._get_fsdp_state()._fsdp_param_group)]


def fsdp_parameters(model: nn.Module) -> dict[tuple[nn.Module, str], FSDPParam]:
    """What FSDP keeps beside each parameter, by module and name."""
    places = [(kept._module_info, kept) for group in parameter_groups(model) for kept in group.fsdp_params]
    return {(place.module, place.param_name): kept for place, kept in places}


def pad(parameter: DTensor, kept: FSDPParam) -> None:
    """Gives a short shard, allocated but not filled, the size of the others, which FSDP gathers.

    Else FSDP copies it before the first forward: where weights are offloaded, into memory that is page-locked in powers
    of two, while the driver keeps the lock of what is freed.
    """
    local = parameter.to_local()
    if local.untyped_storage().nbytes() < math.prod(kept.padded_sharded_param_size) * local.itemsize:
        padded = local.new_zeros(kept.padded_sharded_param_size)
        kept._sharded_param_data = padded.view(-1)
        parameter._local_tensor = padded[: local.shape[0]]


def _tell_transformers(causal_lm: nn.Module) -> None:
    """Marks the model as sharded, so that Trainer and accelerate neither move it nor wrap it again."""
    causal_lm._is_distributed_loading_by_transformers = True
    causal_lm._is_fsdp_managed_module = True


def computes_on(causal_lm: nn.Module, device: torch.device) -> None:
    """Makes `device` the model's, which transformers takes for its own tensors when it generates.

    It would else take that of the first parameter: the embedding may wait in host RAM.
    """
    kind = type(causal_lm)
    causal_lm.__class__ = type(kind.__name__, (kind,), {"device": property(lambda _: device)})


def local_rows(total: int, shard: int, shards: int) -> tuple[int, int]:
    """Rows [start, stop) of dimension 0 that FSDP2 keeps as one of the shards: equal, the last ones short or empty."""
    chunk = -(-total // shards)
    return min(shard * chunk, total), min((shard + 1) * chunk, total)


def first_element(parameter: torch.Tensor) -> int:
    """The place in the whole weight of the first element that this rank holds."""
    if not isinstance(parameter, DTensor):
        return 0
    mesh = shard_mesh(parameter.device_mesh)
    start, _ = local_rows(parameter.shape[0], mesh.get_local_rank(), mesh.size())
    return start * parameter.shape[1:].numel()
