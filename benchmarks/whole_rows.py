"""Prepared rows that are one example each, so that attention has as much to compute as a row can ask for.

Rows packed from short examples have far less of it, and compare with nothing.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

from tier_run import ROOT

TEMPLATE_TOKENS = 60
"At most, what stands around the answer."
HELD_OUT = 4


def prepared(tokens: int, rows: int, output: Path, tokenizer: Path) -> Path:
    """A folder of `prepare`: `rows` of nearly `tokens` to train on: the shipped texts, shuffled and joined.

    Made once in `output`.
    """
    data = output / f"data-{rows}-of-{tokens}"
    if (data / "report.json").exists():
        return data
    file = data.with_suffix(".jsonl")
    _write(file, tokens, rows + HELD_OUT, tokenizer)
    done = subprocess.run(
        [sys.executable, "cli.py", "prepare", "--dataset", file, "--output", data, "--tokenizer", tokenizer,
         "--template", "plain", "--max-length", str(tokens), "--set",
         f"data.test_fraction={HELD_OUT / (rows + HELD_OUT)}"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return data


def _write(file: Path, tokens: int, count: int, tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    tokenize = AutoTokenizer.from_pretrained(str(tokenizer))
    shipped = (ROOT / "examples" / "instructions" / "instructions.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [message["content"] for line in shipped for message in json.loads(line)["messages"]]
    ids_of = tokenize(texts, add_special_tokens=False)["input_ids"]
    chance, room = random.Random(0), tokens - TEMPLATE_TOKENS
    with file.open("w", encoding="utf-8") as stream:
        for number in range(count):
            ids: list[int] = []
            while len(ids) < room:
                ids += chance.choice(ids_of)
            messages = [
                {"role": "user", "content": f"Text {number}."},
                {"role": "assistant", "content": _text_of(ids, room, tokenize)},
            ]
            stream.write(json.dumps({"messages": messages}) + "\n")


def _text_of(ids: list[int], room: int, tokenize) -> str:
    """As much of the ids' text as has at most `room` tokens: joined, texts have other tokens where they meet."""
    while True:
        text = tokenize.decode(ids[:room])
        ids = tokenize(text, add_special_tokens=False)["input_ids"]
        if len(ids) <= room:
            return text
