"""Plain texts: all of them trained, split at max_length, packed apart from what stands beside them."""

import json
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from preparing import chat, refused, rows, run, write
from tiny_tokenizer import tiny_tokenizer

from fitune.config.recipe import Data, Recipe, Source
from fitune.data.chat_template import apply_chat_template_choice
from fitune.data.dataset import TokenisedRows
from fitune.data.prepared import check_prepared, load_rows
from fitune.errors import UsageError
from fitune.training.bad_rows import name_rows
from fitune.training.generate import _conversations

LONG = " ".join(f"word{number}" for number in range(100))
LENGTH = 64


def load(tmp_path, tokenizer, packing=True) -> TokenisedRows:
    recipe = recipe_for(tmp_path / "out", packing)
    check_prepared(recipe, tokenizer)
    return load_rows(recipe, "train", tokenizer, tmp_path / "cache")


def recipe_for(folder, packing=True) -> Recipe:
    return Recipe.model_construct(data=Data(dataset="-", prepared=str(folder)), max_length=LENGTH, packing=packing)


def texts(*contents) -> list[dict]:
    return [{"text": content} for content in contents]


def test_texts_are_counted_that_are_taken(tmp_path):
    path = write(tmp_path / "a.jsonl", *texts(*(f"text number {n}" for n in range(40))))
    report = run(path, tmp_path, {"weight": 0.25})
    assert report["texts"] == report["rows_kept"] < 20


def test_a_text_is_trained_whole_between_its_ends_and_split(tmp_path):
    tokenizer = tiny_tokenizer()
    report = run(
        write(tmp_path / "a.jsonl", *texts(LONG, LONG + "!")), tmp_path, tokenizer=tokenizer, max_length=LENGTH
    )
    assert report["texts"] == 2 and report["dropped"] == {}
    found = load(tmp_path, tokenizer, packing=False)
    assert len(found) > 2
    read = [found[number] for number in range(len(found))]
    whole = tokenizer.decode([token for row in read for token in row["input_ids"]])
    assert whole == f"<|begin_of_text|>{rows(tmp_path)[0]['text']}<|end_of_text|>"
    assert [len(row["input_ids"]) for row in read[:-1]] == [LENGTH] * (len(read) - 1)
    for row in read:
        assert row["labels"] == [-100, *row["input_ids"][1:]]


@pytest.mark.parametrize("with_tokens", [True, False])
def test_packed_texts_and_conversations_lie_apart(with_tokens, tmp_path):
    """Whether prepare made the tokens or training does."""
    write(tmp_path / "b.jsonl", *texts(LONG, LONG + "?", "Short.", "Shorter."))
    mix = [Source(dataset=str(tmp_path / "b.jsonl"))]
    tokenizer = tiny_tokenizer()
    options = {"tokenizer": tokenizer, "max_length": LENGTH} if with_tokens else {}
    run(write(tmp_path / "a.jsonl", *map(chat, range(9))), tmp_path, {"mix": mix}, **options)
    apply_chat_template_choice(tokenizer, "llama3")
    found = load(tmp_path, tokenizer)
    assert (tmp_path / "cache").exists() is not with_tokens
    lengths = [length for number in range(len(found)) for length in found[number]["seq_lengths"]]
    assert max(lengths) == LENGTH and len(lengths) > len(found)
    trained = []
    for number in range(len(found)):
        row, start = found[number], 0
        for length in row["seq_lengths"]:
            assert row["labels"][start] == -100, "nothing predicts where a text begins"
            trained.append(sum(label != -100 for label in row["labels"][start : start + length]) / length)
            start += length
    assert min(trained) < 0.5 < max(trained)


def test_a_text_is_read_only_where_a_file_holds_no_conversations(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "x"}, chat(1) | {"text": "y"}, chat(2))
    assert "a.jsonl:1: no 'messages'" in refused(path, tmp_path)
    run(path, tmp_path, format="text", drop_invalid=True)
    assert rows(tmp_path) + rows(tmp_path, "test") in (texts("x", "y"), texts("y", "x"))


def test_texts_that_are_no_texts_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", *texts(" ", 4, None, "a<|eot_id|>b", "[INST] Hi [/INST] Yes"))
    message = refused(path, tmp_path)
    for line, reason in enumerate(
        ["'text' is empty", "expected text, found a number", "'text' is null", "the control token", "already rendered"],
        1,
    ):
        assert any(f"a.jsonl:{line}: " in one and reason in one for one in message.splitlines()), reason
    run(write(tmp_path / "b.jsonl", *texts("a<|eot_id|>b", "c")), tmp_path, escape_control_tokens=True)
    assert {"text": "a< |eot_id|>b"} in rows(tmp_path) + rows(tmp_path, "test")


def test_quality_scores_of_texts_are_no_preferences(tmp_path):
    run(write(tmp_path / "a.jsonl", *({"text": f"{n}", "score": n / 2} for n in range(4))), tmp_path)
    assert run(tmp_path / "a.jsonl", tmp_path, {"keep": {"score": ">= 1"}}, overwrite=True)["rows_kept"] == 2


def test_parquet_of_texts_and_conversations_is_read_again(tmp_path):
    write(tmp_path / "b.jsonl", *texts("One.", "Two."))
    mix = {"mix": [Source(dataset=str(tmp_path / "b.jsonl"))]}
    run(write(tmp_path / "a.jsonl", *map(chat, range(4))), tmp_path, mix, parquet=True)
    first = [*rows(tmp_path), *rows(tmp_path, "test")]
    (tmp_path / "out").rename(tmp_path / "first")
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / "first" / name).unlink()
    run(tmp_path / "first", tmp_path)
    assert sorted(map(json.dumps, rows(tmp_path) + rows(tmp_path, "test"))) == sorted(map(json.dumps, first))


def test_a_bad_step_names_the_text_of_any_piece(tmp_path):
    tokenizer = tiny_tokenizer()
    path = write(tmp_path / "a.jsonl", *texts(LONG, f"Two. {LONG}", f"Three. {LONG}", "Short."))
    run(path, tmp_path, tokenizer=tokenizer, max_length=LENGTH)
    tokens = load(tmp_path, tokenizer).tokens
    for line, row in enumerate(rows(tmp_path), start=1):
        ids = torch.tensor(tokens.ids(line - 1).astype(np.int64))
        for piece in ids.split(LENGTH)[:2]:
            batch = {"input_ids": piece[None], "attention_mask": torch.ones_like(piece)[None]}
            named = name_rows([batch], tokens, tmp_path / "out" / "train.jsonl")
            assert f"train.jsonl:{line}" in named.split(", ")[-1] or f"train.jsonl:{line}," in named, row


def test_texts_are_no_questions(tmp_path):
    run(write(tmp_path / "a.jsonl", *texts("One.", "Two.")), tmp_path)
    with pytest.raises(UsageError, match=r"test\.jsonl: holds texts, not questions; ask with --text"):
        _conversations(SimpleNamespace(recipe=recipe_for(tmp_path / "out")), Namespace(prompt=[], text=[], test=1))


def test_the_preview_shows_a_text_as_trained(tmp_path):
    from io import StringIO

    from rich.console import Console

    out = StringIO()
    path = write(tmp_path / "a.jsonl", *texts("Once.", "Twice."))
    run(path, tmp_path, tokenizer=tiny_tokenizer(), preview=1, console=Console(file=out))
    assert f"<|begin_of_text|>⟦{rows(tmp_path)[0]['text']}<|end_of_text|>⟧" in out.getvalue()
