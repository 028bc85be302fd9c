"""Finds control tokens of the chat template that the base model never learned."""

import json
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from fitune.config.recipe import Recipe
from fitune.config.stored_weights import EMBEDDING, HEAD
from fitune.data.chat_template import control_tokens_of_template
from fitune.errors import UsageError
from fitune.weights.safetensors_files import Checkpoint

SAMPLES = 256
"Ordinary tokens whose embeddings give the usual norm."
UNTRAINED_BELOW = 0.1
"""Share of the usual norm. Base Llama 3 leaves the rows of the llama3 template's tokens at almost nothing."""


def refuse_untrained_control_tokens(recipe: Recipe, base_folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UsageError if the template uses tokens with untrained embeddings that this run would leave as they are.

    The model could neither read nor write them: a frozen base never learns where a turn ends. Their rows of the head
    are no better: all were pushed away from every text, so that none can be told from the others.
    """
    if recipe.method == "full":
        return
    tokens = [t for t in control_tokens_of_template(tokenizer) if t not in recipe.lora.trainable_tokens]
    with Checkpoint(base_folder) as checkpoint:
        usual = _norms(
            checkpoint, torch.linspace(0, checkpoint[EMBEDDING].shape[0] - 1, SAMPLES).long().tolist()
        ).median()
        norms = _norms(checkpoint, tokenizer.convert_tokens_to_ids(tokens))
        can_be_trained = HEAD in checkpoint  # where the head is the embedding, `check_base_model` refuses
    untrained = [token for token, norm in zip(tokens, norms, strict=True) if norm < UNTRAINED_BELOW * usual]
    if untrained:
        rows = f", or train those rows: --set 'lora.trainable_tokens={json.dumps(untrained)}'" if can_be_trained else ""
        raise UsageError(
            f"{recipe.base.model} has untrained embeddings for {', '.join(untrained)}, which chat_template "
            f"{recipe.data.chat_template} needs; use --set data.chat_template=plain{rows}"
        )


def _norms(checkpoint: Checkpoint, rows: list[int]) -> torch.Tensor:
    if not rows:
        return torch.zeros(0)
    return torch.cat([checkpoint.read_rows(EMBEDDING, row, row + 1) for row in rows]).float().norm(dim=1)
