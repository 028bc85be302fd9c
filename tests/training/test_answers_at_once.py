"""Prompts of different lengths in one batch, padded on the left."""

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from fitune.errors import UsageError
from fitune.model.attention import PADDED_ATTENTION
from fitune.model.layer import use_written_out_layers
from fitune.training.answerer import Answerer, refuse_longer_than_the_model

PROMPTS = [torch.arange(3, 3 + length) for length in (17, 4, 9)]


@pytest.mark.parametrize("cached", [True, False])
def test_each_is_answered_as_if_alone(cached, tiny_base):
    """Whether or not config.json wants keys and values cached."""
    model = LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.float64)
    use_written_out_layers(model)
    model.set_attn_implementation(PADDED_ATTENTION)
    model.generation_config.use_cache = model.config.use_cache = cached
    answerer = Answerer(model, AutoTokenizer.from_pretrained(tiny_base), None, "cpu", 12, 0.0)
    alone = [answerer._answer_at_once([prompt])[0] for prompt in PROMPTS]
    assert len(set(alone)) > 1
    assert answerer._answer_at_once(PROMPTS) == alone


def test_an_answer_longer_than_the_model_has_positions_is_refused():
    config = {"max_position_embeddings": 8192}
    refuse_longer_than_the_model(8191, config)
    refuse_longer_than_the_model(8192, {})
    with pytest.raises(UsageError, match=r"--max-new-tokens 8,192: the model"):
        refuse_longer_than_the_model(8192, config)
