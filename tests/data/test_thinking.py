"""The thinking before an answer, by whatever name a row has it."""

import json

import pytest
from preparing import (
    QUESTION,
    YES,
    chat,
    everything,
    refused,
    run,
    trained_text,
    write,
)
from tiny_tokenizer import tiny_tokenizer

THINKING = """{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{% if m.role == 'assistant' %}\
{% generation %}{% if m.KEY %}<think>{{ m.KEY }}</think>{% endif %}{{ m.content }}<|eot_id|>{% endgeneration %}\
{% else %}{{ m.content }}<|eot_id|>{% endif %}{% endfor %}"""


@pytest.mark.parametrize("written_as", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("known_as", ["reasoning_content", "thinking", "reasoning"])
def test_thinking_is_written_by_a_template_that_knows_it_by_any_name(written_as, known_as, tmp_path):
    (tmp_path / "own.jinja").write_text(THINKING.replace("KEY", known_as))
    path = write(tmp_path / "a.jsonl", {"messages": [QUESTION, YES | {written_as: "Hm."}]})
    tokenizer = tiny_tokenizer()
    data = {"chat_template": str(tmp_path / "own.jinja")}
    report = run(path, tmp_path, data, tokenizer=tokenizer, max_length=999)
    assert "<think>Hm.</think>Good." in trained_text(tmp_path, tokenizer, **data)
    assert report["reasoning_dropped"] == 0


def test_thinking_is_refused_or_left_out_with_a_count_where_the_template_does_not_write_it(tmp_path):
    path = write(tmp_path / "a.jsonl", {"messages": [QUESTION, YES | {"thinking": "Hm."}]}, chat(1))
    message = refused(path, tmp_path, tokenizer=tiny_tokenizer())
    assert "a.jsonl:1: messages[1]: the chat template does not write its thinking; " in message
    assert "--set data.reasoning=drop" in message
    report = run(path, tmp_path, {"reasoning": "drop"}, tokenizer=tiny_tokenizer())
    assert report["reasoning_dropped"] == 1
    assert "Hm." not in json.dumps(everything(tmp_path))


ALPACA = {"instruction": "Why?", "output": "Good."}


@pytest.mark.parametrize("row", [ALPACA, {"prompt": "Why?", "completion": "Good."}, {"messages": [QUESTION, YES]}])
@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_thinking_in_a_column_beside_them_belongs_to_the_answer(row, name, tmp_path):
    path = write(tmp_path / "a.jsonl", row | {name: "Hm, well."}, row | {"reasoning": "on"})
    message = refused(path, tmp_path, tokenizer=tiny_tokenizer())
    assert "reasoning_not_written: 1\n" in message and "a.jsonl:1: " in message
    report = run(path, tmp_path, {"reasoning": "drop"}, tokenizer=tiny_tokenizer())
    assert report["reasoning_dropped"] == 1
    (tmp_path / "own.jinja").write_text(THINKING.replace("KEY", name))
    tokenizer, data = tiny_tokenizer(), {"chat_template": str(tmp_path / "own.jinja")}
    path = write(tmp_path / "b.jsonl", row | {name: "Hm, well."})
    run(path, tmp_path, data, tokenizer=tokenizer, max_length=999, overwrite=True)
    assert "<think>Hm, well.</think>Good." in trained_text(tmp_path, tokenizer, **data)


def test_thinking_in_a_column_may_have_any_name_and_needs_one_answer(tmp_path):
    path = write(tmp_path / "a.jsonl", ALPACA | {"Complex_CoT": "Hm."})
    run(path, tmp_path, {"columns": {"reasoning_content": "Complex_CoT"}})
    assert everything(tmp_path)[0]["messages"][-1]["reasoning_content"] == "Hm."
    two = write(tmp_path / "b.jsonl", {"messages": [QUESTION, YES, QUESTION, YES], "thinking": "Hm, well."})
    message = refused(two, tmp_path / "two")
    assert "'thinking' of the whole row does not say which of its 2 answers it belongs to" in message


def test_two_kinds_of_thinking_and_other_values_are_refused(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"messages": [QUESTION, YES | {"thinking": "Hm.", "reasoning": "Well."}]},
        {"messages": [QUESTION, YES | {"thinking": ["Hm."]}]},
    )
    message = refused(path, tmp_path)
    assert "a.jsonl:1: messages[1]: 'thinking' and 'reasoning' differ; keep one" in message
    assert "a.jsonl:2: messages[1]: 'thinking': expected text, found a list" in message
