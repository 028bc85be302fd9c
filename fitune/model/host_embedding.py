"""A frozen embedding that stays in host RAM: of its rows only those of a pass's tokens travel to the GPU.

70B's embedding is 2 GiB, the rows of 3,072 tokens are 48 MiB.
"""

import torch
from torch import nn


class HostEmbedding(nn.Embedding):
    """Looks tokens up in a weight on the CPU; what it gives lies where the ids do."""

    _in_host_ram: torch.Tensor | None = None

    def expect(self, ids: torch.Tensor) -> None:
        """The ids of the one pass that follows, on the CPU: Python need not wait for the GPU to tell them."""
        self._in_host_ram = ids

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        expected, self._in_host_ram = self._in_host_ram, None
        in_host_ram = ids.cpu() if expected is None else expected
        # page-locked for the copy, and not given to another pass before that is done: PyTorch sees to it
        rows = self.weight.new_empty(ids.numel(), self.embedding_dim, pin_memory=ids.is_cuda)
        torch.index_select(self.weight, 0, in_host_ram.reshape(-1), out=rows)
        return rows.to(ids.device, non_blocking=True).view(*ids.shape, self.embedding_dim)


def leave_in_host_ram(embedding: nn.Module) -> None:
    """Makes the nn.Embedding that is `embedding`, or is inside it beside trained tokens, a HostEmbedding."""
    [base] = {module for module in embedding.modules() if type(module) is nn.Embedding}
    base.__class__ = HostEmbedding


def host_embedding(model: nn.Module) -> HostEmbedding | None:
    """That of `model`, if it has one."""
    return next((module for module in model.modules() if isinstance(module, HostEmbedding)), None)
