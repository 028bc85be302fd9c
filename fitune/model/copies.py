"""Several copies of the model: what their ranks add up is let go of once it is where gradients are kept.

FSDP2 holds each unit's sums to the end of the backward pass, so that nobody writes to their memory while copies still
add them up (torch 2.11 to 2.13, `FSDPParamGroup._all_reduce_state`). Gradients that are cast or go to host RAM lie
elsewhere by then, and the sums are 4 bytes for each on the GPU. To be removed when FSDP2 holds no more than the last.
"""

from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup


def hold_few_sums(groups: list[FSDPParamGroup]) -> None:
    """Makes each parameter group of a model of several copies one of those below."""
    for group in groups:
        group.__class__ = CopiesParamGroup


class CopiesParamGroup(FSDPParamGroup):
    """A unit's parameters whose gradients copies of the model add up. Overrides how long the sums are held."""

    def post_backward(self, *unused) -> None:
        """Starts this unit's reduction."""
        let_go_of_sums_before(self)
        super().post_backward(*unused)


def let_go_of_sums_before(group: FSDPParamGroup) -> None:
    """Of the unit whose backward came before `group`'s: they had as long as that takes to arrive.

    Their memory is the reduce-scatter's. No later one writes to it before all is done that reads it.
    """
    streams = group.comm_ctx
    if before := getattr(streams, "adding_up", None):
        if before._post_reduce_event is not None:
            streams.reduce_scatter_stream.wait_event(before._post_reduce_event)
        before._all_reduce_state = None
    streams.adding_up = group
