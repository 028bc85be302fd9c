"""Prepared conversations, and the tokenizer and the template that turn them into tokens and labels."""

from pathlib import Path

from datasets import Dataset, Features, concatenate_datasets, load_dataset
from transformers import PreTrainedTokenizerBase

from fitune.config.command_name import command
from fitune.config.schema import Recipe
from fitune.data.chat_renderer import ChatRenderer
from fitune.data.chat_template import apply_chat_template_choice, read_tokenizer
from fitune.data.conversations import for_template
from fitune.data.file_formats import optional_keys, row_schema
from fitune.data.token_counter import trained_tokens
from fitune.errors import UsageError

IGNORED = -100
"The label of a token that is not trained: torch's own number."


def load_tokenizer(recipe: Recipe, base_folder: Path) -> PreTrainedTokenizerBase:
    """The base's tokenizer with the recipe's chat template and a pad token."""
    tokenizer = read_tokenizer(base_folder)
    apply_chat_template_choice(tokenizer, recipe.data.chat_template)
    return tokenizer


def load_split(recipe: Recipe, split: str, cache: Path) -> Dataset:
    """The `train` or `test` rows that `prepare` wrote: one column, `messages`. Memory-mapped from `cache`."""
    file = Path(recipe.data.prepared) / f"{split}.jsonl"
    if not file.is_file():
        raise UsageError(f"{file}: no such file; run `{command()} prepare RECIPE` first, or set data.prepared")
    features = Features.from_arrow_schema(row_schema(optional_keys(file)))  # the first tool call may come late
    return load_dataset("json", data_files=str(file), features=features, split="train", cache_dir=str(cache))


def tokenised(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """`input_ids` and `labels` of prepared `rows`: the text that `prepare` checked and, of it, the answers it found.

    A label is the token itself where it is trained, else -100. `datasets` keeps the result in its cache.
    """
    return rows.map(
        _tokens_and_labels,
        fn_kwargs={"tokenizer": tokenizer},
        batched=True,
        remove_columns=rows.column_names,
        desc="tokenising",
    )


def _tokens_and_labels(batch: dict[str, list], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    renderer = ChatRenderer(tokenizer.chat_template, tokenizer.special_tokens_map)
    rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    texts, spans = zip(*(renderer.render(*for_template(row)) for row in rows), strict=True)
    encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    labels = [[IGNORED] * len(ids) for ids in encoded["input_ids"]]
    for row, ids, offsets, answers in zip(labels, encoded["input_ids"], encoded["offset_mapping"], spans, strict=True):
        for start, stop in trained_tokens(offsets, answers):
            row[start:stop] = ids[start:stop]
    return {"input_ids": encoded["input_ids"], "labels": labels}


def with_filler_rows(rows: Dataset, multiple: int, token_id: int) -> Dataset:
    """Tokenised `rows` filled up to a multiple of the global batch with rows that have no labels, so count nothing.

    Otherwise accelerate repeats rows of the epoch's start in its last batch, how many depending on the processes.
    """
    missing = -len(rows) % multiple
    if not missing:
        return rows
    filler = rows[0] | {"input_ids": [token_id] * 2, "labels": [IGNORED] * 2}
    if "seq_lengths" in filler:
        filler["seq_lengths"] = [2]
    return concatenate_datasets([rows, Dataset.from_list([filler] * missing, features=rows.features)])
