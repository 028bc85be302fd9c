"""Loss, perplexity and token accuracy of a GGUF file on held-out rows, as llama.cpp computes them.

The file's own chat template and tokenizer are used, by llama.cpp, so this measures what will be served. Of each answer
token llama.cpp is asked for its probability after the tokens before it: it is made to choose that one by a bias on its
logit, and reports the probability that it had without.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import jinja2

from fitune.data.chat_renderer import ChatRenderer
from fitune.data.conversations import for_template
from fitune.errors import FituneError, UsageError
from fitune.export.llama_cpp import INSTALL, Post, is_installed, likeliest_tokens, next_token, start_llama_cpp
from fitune.progress import bar
from fitune.training.evaluate_folder import Scored, metrics, rows_file

EVERY_TOKEN = 10_000_000
"More than any vocabulary has."
LONGEST = 8192
"Tokens of a row, at most as many as the model was made for."


def evaluate_gguf(file: Path, data: Path) -> dict:
    """{"model": metrics, "rows": N}. UsageError for missing rows, and where llama.cpp is not installed."""
    rows = [line for line in rows_file(data).read_text(encoding="utf-8").split("\n") if line]
    if not is_installed():
        raise UsageError(f"eval of a GGUF uses llama.cpp: {INSTALL}")
    post = start_llama_cpp(file, LONGEST)
    with bar("evaluating", len(rows)) as advance:
        return {"model": metrics(score_rows(rows, post, advance)), "rows": len(rows)}


def score_rows(rows: list[str], post: Post, advance: Callable[[], None] = lambda: None) -> Iterator[Scored]:
    """Of each line of a prepared .jsonl."""
    properties = post("/props", {})
    special_tokens = {name: properties.get(name) or "" for name in ("bos_token", "eos_token")}
    renderer = ChatRenderer(properties["chat_template"], special_tokens)
    for number, line in enumerate(rows, 1):
        messages, tools = for_template(json.loads(line))
        try:
            text, spans = renderer.render(messages, tools)
        except jinja2.TemplateError as error:
            raise UsageError(f"row {number}: the file's chat template cannot write it: {error}") from None
        yield _score(*_tokens(text, spans, post), post)
        advance()


def _tokens(text: str, spans: list[tuple[int, int]], post: Post) -> tuple[list[int], list[int]]:
    """Ids of the text, and the places of those that lie in the spans."""
    request = {"content": text, "add_special": False, "parse_special": True, "with_pieces": True}
    tokens = post("/tokenize", request)["tokens"]
    answers = [tuple(len(text[:edge].encode()) for edge in span) for span in spans]
    places, at = [], 0
    for number, token in enumerate(tokens):
        size = len(token["piece"].encode()) if isinstance(token["piece"], str) else len(token["piece"])
        if any(start <= at < stop for start, stop in answers):
            places.append(number)
        at += size
    return [token["id"] for token in tokens], places


def _score(ids: list[int], places: list[int], post: Post) -> Scored:
    loss = right = 0
    for place in places:
        found, likeliest = _log_probability(ids[place], ids[:place], post)
        if found is None or not math.isfinite(found):
            raise FituneError(f"llama.cpp gave no probability for token {ids[place]}: its API has changed")
        loss -= found
        right += likeliest == ids[place]
    return loss, right, len(places)


def _log_probability(token: int, before: list[int], post: Post) -> tuple[float | None, int]:
    """Of a token, and the id of the likeliest one."""
    told = next_token(post, before, 1, chosen=token)
    if told is None:  # only its first bytes of a character: it is looked up among all tokens, which takes a second
        all_tokens = likeliest_tokens(post, before, EVERY_TOKEN)
        found = next((other["logprob"] for other in all_tokens if other["id"] == token), None)
        return found, all_tokens[0]["id"]
    return told["logprob"] if told["id"] == token else None, told["top_logprobs"][0]["id"]
