"""What the tests of prepare share: rows, files, a run of it and its refusals."""

import json
from pathlib import Path

import pytest

from fitune.config.recipe import Data, Recipe
from fitune.data.prepare import prepare
from fitune.data.prepared import load_rows
from fitune.errors import UsageError

EXAMPLES = Path(__file__).parents[2] / "examples" / "instructions" / "instructions.jsonl"


def chat(number, answer="Yes.") -> dict:
    return {"messages": [{"role": "user", "content": f"Question {number}?"}, {"role": "assistant", "content": answer}]}


def write(path: Path, *lines) -> Path:
    """Lines as they are given (bytes, str) or as JSON."""
    encoded = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


def run(source, tmp_path, data=None, **options) -> dict:
    """prepare with `source` as the dataset into tmp_path/out; `data`: further fields of the recipe's data block."""
    settings = Data(dataset=str(source), prepared="unused", **(data or {}))
    return prepare(settings, tmp_path / "out", **options)


def rows(tmp_path, split="train") -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "out" / f"{split}.jsonl").read_text("utf-8").splitlines()]


def everything(tmp_path) -> list[dict]:
    return rows(tmp_path) + rows(tmp_path, "test")


def recipe_for(folder, max_length=99, **data) -> Recipe:
    values = {"dataset": "none", "prepared": str(folder)} | data
    return Recipe.model_construct(data=Data(**values), max_length=max_length, packing=True)


def trained_text(tmp_path, tokenizer, **data) -> str:
    """What is trained of tmp_path/out, by the labels that training reads."""
    settings = Data(dataset="none", prepared=str(tmp_path / "out"), **data)
    recipe = Recipe.model_construct(data=settings, max_length=999, packing=True)
    found = load_rows(recipe, "train", tokenizer, tmp_path / "cache")
    return " ".join(tokenizer.decode([i for i in found[n]["labels"] if i != -100]) for n in range(len(found)))


def refused(source, tmp_path, data=None, **options) -> str:
    """The message of the error; checks that nothing was left behind."""
    with pytest.raises(UsageError) as caught:
        run(source, tmp_path, data, **options)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    return str(caught.value)


QUESTION = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be brief."}
NO, YES = ({"role": "assistant", "content": text} for text in ("Bad.", "Good."))
