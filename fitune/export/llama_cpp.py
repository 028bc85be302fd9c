"""llama.cpp's server in this process, asked about one GGUF file."""

import importlib.util
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from fitune.data.file_formats import first_line
from fitune.errors import FituneError, UsageError

Post = Callable[[str, dict], dict]
"What llama.cpp's server answers to a path and a request; an empty request is a GET."
INSTALL = "pip install xllamacpp"
CHOSEN = 10_000
"Added to a logit, so that its token is chosen."


def is_installed() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


def start_llama_cpp(file: Path, longest: int, *, on_cpu: bool = False) -> Post:
    """Its server, on a port of its choice of this machine alone, for at most `longest` tokens at a time.

    It computes on a GPU if it was built for one, unless `on_cpu`. A process that started it ends by `leave`.
    """
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel = str(file), longest, 1
    parameters.verbosity, parameters.warmup = -1, False
    if on_cpu:
        parameters.n_gpu_layers = 0
    try:
        server = xllamacpp.Server(parameters)
    except RuntimeError as error:
        raise UsageError(f"{file}: llama.cpp cannot load it: {first_line(error)}") from None
    address = server.listening_address

    def post(path: str, request: dict) -> dict:
        body = json.dumps(request).encode() if request else None
        asked = urllib.request.Request(address + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(asked) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise FituneError(f"{file}: llama.cpp answers {error.code} to {path}: {first_line(error.read())}") from None

    post.server = server  # lives as long as who asks it
    return post


def next_token(post: Post, beginning: list[int], likeliest: int, chosen: int | None = None) -> dict | None:
    """The token that comes after `beginning`, or is `chosen`: {"id", "logprob", "top_logprobs"}, these of so many.

    Log-probabilities are those without the choice. None where that token begins a character and does not end it: the
    server then waits for the rest, and says nothing of it.
    """
    request = {"prompt": beginning, "n_predict": 1, "temperature": 0, "n_probs": likeliest, "cache_prompt": True}
    bias = {} if chosen is None else {"logit_bias": [[chosen, CHOSEN]]}
    return next(iter(post("/completion", request | bias).get("completion_probabilities", [])), None)


def likeliest_tokens(post: Post, beginning: list[int], count: int) -> list[dict]:
    """{"id", "logprob"} of tokens that may come after `beginning`, the likeliest first, whatever their bytes are."""
    told = next_token(post, beginning, count)
    if told is None:
        [letter] = post("/tokenize", {"content": "a", "add_special": False})["tokens"][-1:]
        told = next_token(post, beginning, count, chosen=letter)
    return told["top_logprobs"]


def leave(code: int = 0) -> None:
    """The end of a process in which llama.cpp ran: its threads do not end by themselves."""
    os._exit(code)
