"""Prepared rows that are one example each, so that attention has as much to compute as a row can ask for.

Rows packed from short examples have far less of it, and compare with nothing.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

from tier_run import ROOT

ENDS = 2
"Tokens: those that begin and end a text."
LONGER = 1.02
"How much longer the texts that are joined are than what is cut from them: joined, they have somewhat fewer tokens."


def prepared(tokens: int, rows: int, output: Path, tokenizer: Path) -> Path:
    """A folder of `prepare`: `rows` of exactly `tokens` to train on, the last one of some tokens less.

    They are the pieces of a text of that length: the shipped texts, shuffled and joined. Made once in `output`.
    """
    data = output / f"data-{rows}-of-{tokens}"
    if (data / "report.json").exists():
        return data
    file = data.with_suffix(".jsonl")
    _write(file, rows * tokens - ENDS, tokenizer)
    done = subprocess.run(
        [sys.executable, "cli.py", "prepare", "--dataset", file, "--output", data, "--tokenizer", tokenizer,
         "--template", "plain", "--max-length", str(tokens), "--set", "data.test_fraction=0.5"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return data


def _write(file: Path, tokens: int, tokenizer: Path) -> None:
    """Two texts of that many tokens, one to train on and one held out."""
    from transformers import AutoTokenizer

    tokenize = AutoTokenizer.from_pretrained(str(tokenizer))
    shipped = (ROOT / "examples" / "instructions" / "instructions.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [message["content"] for line in shipped for message in json.loads(line)["messages"]]
    ids_of = tokenize(texts, add_special_tokens=False)["input_ids"]
    chance = random.Random(0)
    with file.open("w", encoding="utf-8") as stream:
        for number in range(2):
            ids = tokenize(f"Text {number}. ", add_special_tokens=False)["input_ids"]
            while len(ids) < LONGER * tokens:
                ids += chance.choice(ids_of)
            whole = tokenize(tokenize.decode(ids), add_special_tokens=False)["input_ids"]
            stream.write(json.dumps({"text": tokenize.decode(whole[:tokens])}) + "\n")
