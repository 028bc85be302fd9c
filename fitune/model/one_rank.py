"""FSDP with one rank: weights on the GPU are used where they are, the others travel there while a layer computes.

A frozen embedding in host RAM is used where it is, too: `fitune.model.host_embedding`.

With several ranks FSDP2 gathers the next layer on a stream of its own. With one it copies each weight when it is used,
on the stream that computes, and copies even those that already lie on the GPU (torch 2.11 to 2.13,
`FSDPParamGroup.wait_for_unshard`). Gradients that stay on the GPU it copies into a buffer and from there into another,
though nobody has others to add to them (`foreach_reduce`). To be removed when FSDP2 does for one rank what it does for
several.
"""

import torch
from torch.distributed.fsdp._fully_shard._fsdp_collectives import AllGatherResult
from torch.distributed.fsdp._fully_shard._fsdp_common import HSDPMeshInfo
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, alloc_storage
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup, TrainingState

from fitune.model.copies import let_go_of_sums_before
from fitune.model.host_embedding import HostEmbedding


def use_weights_in_place(groups: list[FSDPParamGroup]) -> None:
    """Makes each parameter group of a model sharded over one rank one of those below."""
    for group in groups:
        group.__class__ = OneRankParamGroup


class OneRankParamGroup(FSDPParamGroup):
    """A unit's parameters when one rank holds all of them. Overrides how they become whole, and how gradients stay."""

    def unshard(self, async_op: bool = False) -> None:
        """Starts the copies that are needed, straight into the tensors that will be used."""
        skipped = not self.unshard_in_backward and self._training_state == TrainingState.PRE_BACKWARD
        if self._all_gather_result is not None or self.is_unsharded or skipped:
            return
        stream = self.comm_ctx.all_gather_copy_in_stream
        copied = [parameter for parameter in self.fsdp_params if not _use_in_place(parameter)]
        for parameter in copied:
            _allocate(parameter, self.device)
        # the memory just taken may still be read by kernels that were queued before
        stream.wait_stream(self.device_handle.current_stream())
        with self.device_handle.stream(stream):
            _copy(copied)
            copies_done = self.device_handle.Event()
            copies_done.record()
        self._all_gather_result = AllGatherResult(None, copies_done, None, [], [], [])

    def wait_for_unshard(self) -> None:
        """Lets the computing stream, not the CPU, wait for the copies."""
        if self._all_gather_result is None:
            return
        self.device_handle.current_stream().wait_event(self._all_gather_result.all_gather_event)
        for parameter in self.fsdp_params:
            parameter.init_unsharded_param()
        self._to_unsharded()
        self._all_gather_result = None

    def post_backward(self, *unused) -> None:
        """Adds the pass's gradients to those of earlier ones, if they go to no other copy of the model or host RAM."""
        travel = isinstance(self.mesh_info, HSDPMeshInfo) or any(p.offload_to_cpu for p in self.fsdp_params)
        if travel or not self.reduce_grads:
            let_go_of_sums_before(self)
            super().post_backward(*unused)
            return
        self._training_state = TrainingState.POST_BACKWARD
        taken = [(parameter, gradient) for parameter in self.fsdp_params
                 if (gradient := _take_gradient(parameter)) is not None]  # fmt: skip
        if self.reshard_after_backward:
            self.reshard()
        _add_gradients(taken)


def _take_gradient(parameter: FSDPParam) -> torch.Tensor | None:
    """In the dtype of the computation."""
    computed_with = getattr(parameter, "_unsharded_param", None)
    if computed_with is None:
        return None
    gradient, computed_with.grad = computed_with.grad, None
    return gradient


@torch.no_grad()
def _add_gradients(taken: list[tuple[FSDPParam, torch.Tensor]]) -> None:
    """To those of earlier passes, or as they are where any dtype will do (`fitune.model.gradient_dtype`).

    Also calls the hooks of stored parameters, which autograd does not know.
    """
    kept, added = [], []
    for parameter, gradient in taken:
        stored = parameter.sharded_param
        if stored.grad_dtype is None:
            stored.grad = parameter.to_sharded_dtensor(gradient.contiguous())
        elif stored.grad is None:
            room = torch.empty_like(gradient, dtype=parameter.orig_dtype)
            stored.grad = parameter.to_sharded_dtensor(room)
            kept.append((room, gradient))
        else:
            narrow = parameter.orig_dtype != torch.float32  # rounded before it is added, as FSDP does
            added.append((stored.grad._local_tensor, gradient.to(parameter.orig_dtype) if narrow else gradient))
    for change, pairs in ((torch._foreach_copy_, kept), (torch._foreach_add_, added)):
        if pairs:
            change(*map(list, zip(*pairs, strict=True)))
    for parameter, _ in taken:
        for hook in (parameter.sharded_param._post_accumulate_grad_hooks or {}).values():
            hook(parameter.sharded_param)


def _use_in_place(parameter: FSDPParam) -> bool:
    """Whether the stored weight is the one to compute with; then it is made so, once."""
    travels = parameter.offload_to_cpu and not isinstance(parameter._module_info.module, HostEmbedding)
    if travels or parameter.param_dtype not in (None, parameter.orig_dtype):
        return False
    if not hasattr(parameter, "_unsharded_param"):
        parameter.all_gather_outputs = [parameter._sharded_param_data]
        parameter.init_unsharded_param()
        parameter.all_gather_outputs = []  # FSDP frees what stands here after use
    return True


def _allocate(parameter: FSDPParam, device: torch.device) -> None:
    if not parameter.all_gather_outputs:
        stored = parameter._sharded_param_data
        dtype = parameter.param_dtype or stored.dtype
        parameter.all_gather_outputs = [torch.empty(stored.shape, dtype=dtype, device=device)]
    alloc_storage(parameter.all_gather_outputs[0])


def _copy(parameters: list[FSDPParam]) -> None:
    """What lies on the GPU by few kernels: Python is else not ahead of products in fp8."""
    there, travelling = [], []
    for parameter in parameters:
        stored, target = parameter._sharded_param_data, parameter.all_gather_outputs[0]
        (there if stored.device == target.device else travelling).append((target, stored))
    with torch.autograd._unsafe_preserve_version_counter(tuple(target for target, _ in there + travelling)):
        for target, stored in travelling:
            cast_there = stored.dtype != target.dtype
            target.copy_(stored.to(target.device, non_blocking=True) if cast_there else stored, non_blocking=True)
        if there:
            torch._foreach_copy_(*map(list, zip(*there, strict=True)))
