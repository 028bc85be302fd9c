"""What llama.cpp makes of a GGUF file: its chat endpoint's answer, and the loss of every token. No fitune, no torch.

python ask_llama_cpp.py FILE < {"messages": [...], "ids": [...], "new_tokens": N, "ends": [...]} > answer as JSON

Of each token of `ends` it says why an answer stopped that was made to consist of nothing else.
"""

import json
import os
import sys

FORCED = 10_000
"Added to a token's logit so that it is chosen; the probability that is reported is the one without."


def main() -> None:
    question = json.load(sys.stdin)
    out = os.dup(1)
    os.dup2(2, 1)  # llama.cpp writes its log there
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = sys.argv[1]
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers, parameters.warmup = 512, 1, 0, False
    parameters.cpuparams.n_threads = 1
    server = xllamacpp.Server(parameters)
    chat = {"messages": question["messages"], "temperature": 0, "repeat_penalty": 1}
    chat["max_tokens"] = question["new_tokens"]

    def answer_to(request: dict) -> dict:
        return call(server.handle_chat_completions, chat | request)["choices"][0]

    said, ids = answer_to({}), question["ids"]
    answer = {
        "text": said["message"]["content"],
        "ends": [answer_to({"logit_bias": [[token, FORCED]]})["finish_reason"] for token in question["ends"]],
        "losses": [loss(server, ids[:n], ids[n]) for n in range(1, len(ids))],
    }
    os.write(out, json.dumps(answer).encode())
    os._exit(0)  # its threads do not end by themselves


def call(handler, request: dict) -> dict:
    answer = handler(request)
    answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
    if "error" in answer:
        raise SystemExit(str(answer["error"]))
    return answer


def loss(server, before: list[int], token: int) -> float:
    request = {"prompt": before, "max_tokens": 1, "temperature": 0, "logprobs": 1, "logit_bias": [[token, FORCED]]}
    [chosen] = call(server.handle_completions, request)["choices"][0]["logprobs"]["content"]
    assert chosen["id"] == token, chosen
    return -chosen["logprob"]


main()
