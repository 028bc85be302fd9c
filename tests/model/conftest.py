"""Fixtures for tests of the layer written out."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fitune.model import layer


@pytest.fixture
def exact(monkeypatch):
    """transformers' norm in the dtype of its input, where it would compute in float32."""

    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(layer, "MLP_TILE", 7)
