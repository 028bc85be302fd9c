"""`eval` of a GGUF: which tokens llama.cpp is asked about, and what is made of its answers. A stand-in gives them.

`make loaders` compares the real one with transformers.
"""

import json
import math

import pytest
from click.testing import CliRunner

from fitune.cli import cli
from fitune.data.chat_template import TEMPLATE_FOLDER
from fitune.errors import FituneError, UsageError
from fitune.training import evaluate_gguf
from fitune.training.evaluate_folder import metrics
from fitune.training.evaluate_gguf import score_rows

MESSAGES = [{"role": "user", "content": "Hü?"}, {"role": "assistant", "content": "né 1"}]
ROWS = [json.dumps({"messages": MESSAGES}), json.dumps({"messages": [*MESSAGES, *MESSAGES]})]


class LlamaCpp:
    """Every byte is a token; a token is as likely as 1 / (its id + 1), and likeliest if even.

    Like the real one, it says nothing of a token that begins a character and does not end it.
    """

    def __init__(self, template="chatml", **answers):
        self.asked, self.answers = [], answers
        self.template = (TEMPLATE_FOLDER / f"{template}.jinja").read_text()

    def __call__(self, path, request):
        if path == "/props":
            return {"chat_template": self.template, "bos_token": "<s>", "eos_token": "</s>"}
        if path == "/tokenize":
            assert not request["add_special"]
            pieces = [bytes([byte]) for byte in request["content"].encode()]
            return {"tokens": [{"id": p[0], "piece": p.decode() if p[0] < 128 else list(p)} for p in pieces]}
        if request["n_probs"] > 256:
            every = [{"id": byte, "logprob": -math.log(byte + 1)} for byte in range(256)]
            return {"completion_probabilities": [{"id": 0, "top_logprobs": every}]}
        [[token, _]] = request["logit_bias"]
        self.asked.append((bytes(request["prompt"]), token))
        if token >= 0xC0:
            return {"content": "\ufffd"}
        best = token if token % 2 == 0 else token - 1
        chosen = {"id": token, "logprob": -math.log(token + 1), "top_logprobs": [{"id": best}]} | self.answers
        return {"completion_probabilities": [chosen]}


def test_every_answer_token_is_asked_about_after_those_before_it():
    llama_cpp = LlamaCpp()
    [(loss, right, count)] = score_rows(ROWS[:1], llama_cpp)
    answer = "né 1<|im_end|>".encode()
    assert bytes(token for _, token in llama_cpp.asked)[: len(answer)] == answer
    whole = "<|im_start|>user\nHü?<|im_end|>\n<|im_start|>assistant\n".encode()
    assert [before for before, _ in llama_cpp.asked[: len(answer)]] == [whole + answer[:n] for n in range(len(answer))]
    tokens = [token for _, token in llama_cpp.asked]
    assert count == len(tokens)
    assert loss == pytest.approx(sum(math.log(token + 1) for token in tokens))
    assert right == sum(token % 2 == 0 for token in tokens)


def test_no_token_between_two_answers_counts():
    once, twice = LlamaCpp(), LlamaCpp()
    for llama_cpp, row in ((once, ROWS[0]), (twice, ROWS[1])):
        list(score_rows([row], llama_cpp))
    tokens = bytes(token for _, token in once.asked)
    assert tokens == "né 1<|im_end|>".encode()
    assert bytes(token for _, token in twice.asked) == 2 * tokens


def test_rows_count_by_their_tokens():
    one, two = (list(score_rows([row], LlamaCpp())) for row in ROWS)
    assert two[0][2] == 2 * one[0][2]
    assert metrics(score_rows(ROWS, LlamaCpp())) == pytest.approx(metrics(one) | {"tokens": 3 * one[0][2]})


def test_a_token_that_only_begins_a_character_is_looked_up_among_all():
    [(loss, right, count)] = score_rows(
        [json.dumps({"messages": [MESSAGES[0], MESSAGES[1] | {"content": "é"}]})], LlamaCpp()
    )
    answer = "é<|im_end|>".encode()
    assert count == len(answer) and right == sum(token % 2 == 0 for token in answer)
    assert loss == pytest.approx(sum(math.log(token + 1) for token in answer))


def test_an_answer_about_another_token_is_refused():
    with pytest.raises(FituneError, match="its API has changed"):
        list(score_rows(ROWS, LlamaCpp(id=-1)))


def test_a_row_that_the_template_refuses_is_named():
    llama_cpp = LlamaCpp()
    llama_cpp.template = "{{ raise_exception('no such role') }}"
    with pytest.raises(UsageError, match=r"row 1: .*no such role"):
        list(score_rows(ROWS, llama_cpp))


def test_a_line_ends_where_json_lines_do(tmp_path, monkeypatch):
    """Unicode has more ends of lines, which stand in a row's text as they are."""
    answers = ["one\u2028two", "one\u2029two", "one\x85two"]
    rows = [{"messages": [MESSAGES[0], {"role": "assistant", "content": answer}]} for answer in answers]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    monkeypatch.setattr(evaluate_gguf, "is_installed", lambda: True)
    monkeypatch.setattr(evaluate_gguf, "start_llama_cpp", lambda *_: LlamaCpp())
    assert evaluate_gguf.evaluate_gguf(tmp_path / "model.gguf", tmp_path)["rows"] == 3


def test_what_is_missing_is_said_in_one_line(tmp_path, monkeypatch):
    file = tmp_path / "mine.gguf"
    file.touch()
    rows = tmp_path / "rows.jsonl"

    def refused(*words) -> str:
        outcome = CliRunner().invoke(cli, ["eval", str(file), *map(str, words)])
        assert outcome.exit_code == 2, outcome.output
        return outcome.stderr

    assert "give --data FOLDER, which prepare wrote" in refused()
    assert "rows.jsonl: no such file" in refused("--data", rows)
    rows.write_text(ROWS[0] + "\n")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refused("--data", rows) == "error: eval of a GGUF uses llama.cpp: pip install xllamacpp\n"
