"""Prepared conversations and the tokenizer that turns them into tokens."""

from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fitune.data.chat_template import apply_chat_template_choice
from fitune.config import Recipe
from fitune.errors import UsageError


def load_tokenizer(recipe: Recipe, base_folder: Path) -> PreTrainedTokenizerBase:
    """The base's tokenizer with the recipe's chat template and a pad token that is never eos."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    apply_chat_template_choice(tokenizer, recipe.data.chat_template)
    return tokenizer


def load_split(recipe: Recipe, split: str, cache: Path) -> Dataset:
    """The `train` or `test` rows that `prepare` wrote: one column, `messages`. Memory-mapped from `cache`."""
    file = Path(recipe.data.prepared) / f"{split}.jsonl"
    if not file.is_file():
        raise UsageError(f"{file}: no such file; run `python cli.py prepare RECIPE` first, or set data.prepared")
    return load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))
