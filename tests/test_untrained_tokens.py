"""A base that never learned the template's control tokens is named, with what to do."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fitune.data.dataset import load_tokenizer
from fitune.errors import UsageError
from fitune.untrained_tokens import refuse_untrained_control_tokens

NAMES = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture(scope="module")
def base_like_llama_3(tiny_base, tmp_path_factory) -> Path:
    """The tiny base with the rows of the llama3 template's tokens at almost nothing, as in Llama 3's base models."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "untrained"
    shutil.copytree(tiny_base, folder)
    weights = load_file(folder / "model.safetensors")
    rows = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(NAMES)
    weights["model.embed_tokens.weight"][torch.tensor(rows)] *= 1e-4
    save_file(weights, folder / "model.safetensors")
    return folder


def check(run) -> None:
    folder = Path(run.recipe.base.model)
    refuse_untrained_control_tokens(run.recipe, folder, load_tokenizer(run.recipe, folder))


def test_untrained_tokens_are_named_with_both_ways_out(base_like_llama_3, make_run, tmp_path):
    with pytest.raises(UsageError) as caught:
        check(make_run(base_like_llama_3, tmp_path, "lora"))
    message = str(caught.value)
    assert all(name in message for name in NAMES)
    assert "data.chat_template=plain" in message and "lora.trainable_tokens=" in message


def test_what_the_message_offers_works(base_like_llama_3, tiny_base, make_run, tmp_path):
    check(make_run(base_like_llama_3, tmp_path, "lora", chat_template="plain"))
    check(make_run(base_like_llama_3, tmp_path, "lora", lora={"trainable_tokens": NAMES}))
    check(make_run(base_like_llama_3, tmp_path, "full"))
    check(make_run(tiny_base, tmp_path, "lora"))
    with pytest.raises(UsageError, match=r"untrained embeddings for <\|eot_id\|>,"):
        check(make_run(base_like_llama_3, tmp_path, "lora", lora={"trainable_tokens": NAMES[:2]}))
