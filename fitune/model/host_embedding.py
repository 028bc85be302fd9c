"""A frozen embedding that stays in host RAM: of its rows only those of a pass's tokens travel to the GPU.

70B's embedding is 2 GiB, the rows of 3,072 tokens are 48 MiB.
"""

import torch
from torch import nn
from torch.nn import functional as F

AT_ONCE = 4096
"Tokens whose rows are in host RAM at a time where Python waits for them: 64 MiB at 70B."


class HostEmbedding(nn.Embedding):
    """Looks tokens up in a weight on the CPU; what it gives lies where the ids do."""

    _in_host_ram: torch.Tensor | None = None

    def expect(self, ids: torch.Tensor) -> None:
        """The ids of the one pass that follows, on the CPU: Python need not wait for the GPU to tell them."""
        self._in_host_ram = ids

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        expected, self._in_host_ram = self._in_host_ram, None
        if expected is None:
            return self._rows_of(ids)
        # page-locked for the copy, and not given to another pass before that is done: PyTorch sees to it
        rows = self.weight.new_empty(ids.numel(), self.embedding_dim, pin_memory=ids.is_cuda)
        torch.index_select(self.weight, 0, expected.reshape(-1), out=rows)
        return rows.to(ids.device, non_blocking=True).view(*ids.shape, self.embedding_dim)

    def _rows_of(self, ids: torch.Tensor) -> torch.Tensor:
        """Python waits for the GPU to tell the ids, as where a model is asked, so it may wait for the rows too.

        They are not page-locked, and few are there at once: a prompt of 32,768 tokens has 512 MiB of them at 70B.
        """
        rows = self.weight.new_empty(ids.numel(), self.embedding_dim, device=ids.device)
        for some, of_them in zip(ids.cpu().reshape(-1).split(AT_ONCE), rows.split(AT_ONCE), strict=True):
            of_them.copy_(F.embedding(some, self.weight))
        return rows.view(*ids.shape, self.embedding_dim)


def leave_in_host_ram(embedding: nn.Module) -> None:
    """Makes the nn.Embedding that is `embedding`, or is inside it beside trained tokens, a HostEmbedding."""
    [base] = {module for module in embedding.modules() if type(module) is nn.Embedding}
    base.__class__ = HostEmbedding


def host_embedding(model: nn.Module) -> HostEmbedding | None:
    """That of `model`, if it has one."""
    return next((module for module in model.modules() if isinstance(module, HostEmbedding)), None)
