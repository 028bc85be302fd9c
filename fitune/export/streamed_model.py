"""Several variants of one model side by side, whose weights are read a few rows at a time while they compute.

transformers' own code is the model; its linears, embeddings and norms are exchanged for ones that ask a `Weights` for
their products. Memory holds activations and one chunk of rows, so that a 70B model computes in a few hundred MiB.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from fitune.errors import FituneError
from fitune.progress import bar


class Weights(Protocol):
    """What the layers ask. Inputs and outputs hold the variants one after the other along dimension 0."""

    def product(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x [variants * rows, tokens, in] -> x @ weight^T [variants * rows, tokens, out]."""

    def embed(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """ids [variants * rows, tokens] -> rows of an embedding [variants * rows, tokens, hidden]."""

    def vectors(self, name: str, rows: int) -> torch.Tensor:
        """A vector of each variant, [variants * rows, 1, size], ready to be broadcast over tokens."""


def streamed_model(folder: Path, weights: Weights, rows: int, *, tied: bool, on_layer: Callable[[], object]):
    """The model of `folder`'s config.json, float32 on the CPU, for inputs of `rows` rows a variant.

    Raises FituneError for a model with other parts than linears, embeddings and vectors of the hidden size or, for
    the norms of heads, of theirs.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
        ).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            stored = "model.embed_tokens" if tied and name == "lm_head" else name
            model.set_submodule(name, _Linear(stored, module.bias is not None, weights, rows, on_layer))
        elif isinstance(module, nn.Embedding):
            model.set_submodule(name, _Embedding(name, weights))
        elif name.endswith("rotary_emb"):
            model.set_submodule(name, type(module)(config=config))
        else:
            of_heads = name.endswith(("q_norm", "k_norm"))
            _exchange_vectors(
                module, name, weights, rows, config.head_dim if of_heads else config.hidden_size, of_heads
            )
    if left := next((name for name, buffer in model.named_buffers() if buffer.is_meta), None):
        raise FituneError(f"{folder}: {config.model_type}: {left} cannot be streamed")
    return model


@torch.no_grad()
def logits_side_by_side(
    folder: Path,
    weights: Weights,
    shapes: dict[str, tuple[int, ...]],
    prompts: list[list[int]],
    variants: int,
    *,
    tied: bool,
) -> tuple[torch.Tensor, ...]:
    """Of each variant [prompts, tokens of the longest, vocabulary], under a bar; what follows a prompt means nothing.

    `shapes` are those of the weights, by name.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])  # what follows is not seen
    matrices = sum(1 for shape in shapes.values() if len(shape) == 2)
    with bar("checking matrices", matrices - (not tied)) as advance:
        model = streamed_model(folder, weights, len(prompts), tied=tied, on_layer=advance)
        return model(input_ids=ids.repeat(variants, 1), use_cache=False).logits.chunk(variants)


def _exchange_vectors(module: nn.Module, name: str, weights: Weights, rows: int, size: int, of_heads: bool) -> None:
    """`of_heads` says that a vector is multiplied with each head [rows, tokens, heads, size] of a token."""
    for key, parameter in list(module.named_parameters(recurse=False)):
        if parameter.shape != (size,):
            raise FituneError(f"{name}.{key} of shape {tuple(parameter.shape)} cannot be streamed")
        vectors = weights.vectors(f"{name}.{key}", rows)
        delattr(module, key)
        setattr(module, key, vectors.unsqueeze(1) if of_heads else vectors)


class _Linear(nn.Module):
    def __init__(self, name: str, has_bias: bool, weights: Weights, rows: int, on_layer: Callable[[], object]):
        super().__init__()
        self.name, self.weights, self.on_layer = name, weights, on_layer
        self.bias = weights.vectors(f"{name}.bias", rows) if has_bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.weights.product(f"{self.name}.weight", x)
        self.on_layer()
        return y if self.bias is None else y + self.bias


class _Embedding(nn.Module):
    def __init__(self, name: str, weights: Weights):
        super().__init__()
        self.name, self.weights = name, weights

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weights.embed(f"{self.name}.weight", ids)
