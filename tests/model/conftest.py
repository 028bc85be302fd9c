"""Fixtures for tests of the layer written out."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from fitune.model import layer_pass


@pytest.fixture
def exact(monkeypatch):
    """transformers' norm in the dtype of its input, where it would compute in float32."""

    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    for kind in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(kind, "forward", norm)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(layer_pass, "MLP_TILE", 7)
