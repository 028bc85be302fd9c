"""The prompts on which a written model is checked: held-out conversations of its run, else a few of our own."""

import json
from itertools import islice
from pathlib import Path

from fitune.config.schema import Run
from fitune.data.chat_template import read_tokenizer
from fitune.data.conversations import arguments_as_objects
from fitune.errors import UsageError

PROMPTS, TOKENS = 4, 32
"How many, and how many tokens of each: they bound the check's memory by their logits, 200 MiB for Llama 3."
TEXTS = (
    "What is the capital of France? The capital of France is Paris.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
    "Water boils at 100 degrees Celsius at sea level, and at a lower temperature on a mountain.",
    "Dear Sir or Madam, thank you for your letter of the 3rd of March. We are sorry to hear that",
)


def prompts_for(folder: Path, run: Run | None, vocabulary: int) -> list[list[int]]:
    """Token ids by the tokenizer of the model's `folder`: the first held-out rows of `run`, where they are still there.

    A folder without tokenizer is asked arbitrary tokens.
    """
    try:
        tokenizer = read_tokenizer(folder)
    except UsageError:
        return [[(i * 7919 + j * 104729) % vocabulary for j in range(TOKENS)] for i in range(PROMPTS)]
    rows = _held_out(run) if run else []
    if rows and tokenizer.chat_template:
        texts = [tokenizer.apply_chat_template(arguments_as_objects(row), tokenize=False) for row in rows]
        encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    else:
        encoded = [tokenizer(text)["input_ids"] for text in TEXTS]
    return [ids[:TOKENS] for ids in encoded]


def _held_out(run: Run) -> list[list[dict]]:
    file = Path(run.recipe.data.prepared) / "test.jsonl"
    try:
        with file.open(encoding="utf-8") as stream:
            return [json.loads(line)["messages"] for line in islice(stream, PROMPTS)]
    except (OSError, ValueError, KeyError):
        return []
