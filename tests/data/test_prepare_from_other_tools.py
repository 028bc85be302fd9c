"""prepare: names and shapes that other tools give to turns, calls, columns and files."""

import json
import re

import pytest
import yaml
from preparing import ANSWER, QUESTION, chat, refused, rows, run, write
from tiny_tokenizer import tiny_tokenizer

CALL = {"name": "rain", "arguments": {"city": "Bonn"}}
CALL_TEXT = json.dumps(CALL)


def calls(message: dict) -> list[str]:
    return [call["function"]["arguments"] for call in message["tool_calls"]]


@pytest.mark.parametrize(
    ("user", "assistant"),
    [("User", "Assistant"), ("HUMAN", "GPT"), ("human", "chatgpt"), ("prompter", "bot"), ("user", "model")],
)
def test_roles_have_many_names(user, assistant, tmp_path):
    turns = [{"from": user, "value": "Why?"}, {"from": assistant, "value": "Because."}]
    run(write(tmp_path / "a.jsonl", {"conversations": turns}), tmp_path)
    assert rows(tmp_path) == [{"messages": [QUESTION, ANSWER]}]


def test_an_answer_of_any_name_in_a_prompt_is_not_trained(tmp_path):
    row = {"prompt": [QUESTION, {"role": "Bot", "content": "Bad."}, QUESTION], "completion": [ANSWER]}
    run(write(tmp_path / "a.jsonl", row), tmp_path)
    assert rows(tmp_path)[0]["messages"][1] == {"role": "assistant", "content": "Bad.", "train": False}


def test_calls_that_are_turns_belong_to_the_answer_before_them(tmp_path):
    """ms-swift writes each of several calls, and what is said beside them, as a turn of its own."""
    call, result = {"role": "tool_call", "content": CALL_TEXT}, {"role": "tool_response", "content": "yes"}
    said = {"role": "assistant", "content": "I look."}
    path = write(tmp_path / "a.jsonl", {"messages": [QUESTION, said, call, call, result, result, ANSWER]})
    run(path, tmp_path)
    [row] = rows(tmp_path)
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant", "tool", "tool", "assistant"]
    assert row["messages"][1]["content"] == "I look."
    assert calls(row["messages"][1]) == ['{"city": "Bonn"}'] * 2


def test_calls_of_which_one_is_not_trained_are_not_joined(tmp_path):
    call, result = {"role": "tool_call", "content": CALL_TEXT}, {"role": "tool_response", "content": "yes"}
    path = write(tmp_path / "a.jsonl", {"messages": [QUESTION, call, call | {"loss": False}, result, ANSWER]})
    assert "messages[2]: 'assistant' after 'assistant'" in refused(path, tmp_path)


def test_a_call_in_the_text_of_an_answer_has_a_result(tmp_path):
    """As NousResearch's Hermes data have it. An answer without a call has none."""
    call = {"role": "assistant", "content": f"<tool_call>\n{CALL_TEXT}\n</tool_call>"}
    result = {"role": "tool", "content": "yes"}
    path = write(tmp_path / "a.jsonl", {"messages": [QUESTION, call, result, ANSWER]})
    run(path, tmp_path)
    assert rows(tmp_path)[0]["messages"] == [QUESTION, call, result, ANSWER]
    path = write(tmp_path / "b.jsonl", {"messages": [QUESTION, ANSWER, result, ANSWER]})
    assert "messages[2]: 'tool' after 'assistant'" in refused(path, tmp_path / "b")


def test_a_cut_never_parts_a_call_in_a_text_from_its_result(tmp_path):
    call = {"role": "assistant", "content": f"<tool_call>{CALL_TEXT}</tool_call>"}
    result = {"role": "tool", "content": "much rain " * 60}
    path = write(tmp_path / "a.jsonl", {"messages": [QUESTION, ANSWER, QUESTION, call, result, ANSWER]})
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|eot_id|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|eot_id|>{% endif %}{% endfor %}"
    )
    data = {"chat_template": str(tmp_path / "own.jinja"), "long_rows": "cut"}
    run(path, tmp_path, data, tokenizer=tiny_tokenizer(), max_length=140)
    assert rows(tmp_path)[0]["messages"] == [QUESTION, ANSWER]


COLUMNS = {
    "dolly": {"instruction": "Why?", "context": "", "response": "Because.", "category": "qa"},
    "GSM8K": {"question": "Why?", "answer": "Because."},
    "prompt and response": {"prompt": "Why?", "response": "Because."},
    "instruction and answer": {"instruction": "Why?", "answer": "Because."},
    "in capitals": {"Question": "Why?", "Response": "Because."},
    "turns under another name": {"dialog": [QUESTION, ANSWER]},
    "sharegpt in the singular": {
        "conversation": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
    },
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_columns_of_no_format_are_read_with_the_flag_that_is_named(kind, tmp_path):
    path = write(tmp_path / "a.jsonl", COLUMNS[kind])
    message = refused(path, tmp_path)
    flag = re.search(r"to read them: --set 'data\.columns=(\{.*?\})'", message)
    run(path, tmp_path, {"columns": yaml.safe_load(flag[1])})
    assert rows(tmp_path) == [{"messages": [QUESTION, ANSWER]}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"input_ids": [1, 2], "labels": [1, 2]}, "these are token ids; give the texts"),
        ({"segments": [{"label": True, "text": "a"}]}, "as Axolotl's input_output"),
        ({"id": 1}, "formats: messages: messages; sharegpt: conversations"),
    ],
)
def test_columns_that_no_flag_reads_are_called_what_they_are(row, said, tmp_path):
    assert said in refused(write(tmp_path / "a.jsonl", row, row), tmp_path)


def test_texts_under_another_name(tmp_path):
    path = write(tmp_path / "a.jsonl", {"content": "Once upon a time.", "url": "x"})
    assert "data.columns={text: content}" in refused(path, tmp_path)
    run(path, tmp_path, {"columns": {"text": "content"}})
    assert rows(tmp_path) == [{"text": "Once upon a time."}]


TABLE = {"instruction": ["Why?", "How?"], "output": ["Because.", "So."]}
FILES = {
    "rows under names": (
        {str(n): chat(n) for n in range(2)},
        r"rows under a name each, such as '0'; .* jq -c '\.\[\]'",
    ),
    "rows deeper inside": ({"data": {"train": [chat(1)]}}, "an object inside 'data'; take what is inside: jq '.data'"),
    "columns": (TABLE, "the lists 'instruction', 'output', the columns of a table"),
    "columns of pandas": (
        {name: {str(n): text for n, text in enumerate(column)} for name, column in TABLE.items()},
        "the objects 'instruction', 'output', the columns of a table",
    ),
}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("kind", FILES)
def test_an_object_of_another_shape_is_called_what_it_is(kind, indent, tmp_path):
    content, said = FILES[kind]
    (tmp_path / "a.json").write_text(json.dumps(content, indent=indent))
    assert re.search(said, refused(tmp_path / "a.json", tmp_path))


def test_rows_over_several_lines_each_are_called_that(tmp_path):
    path = write(tmp_path / "a.jsonl", *(json.dumps(chat(n), indent=2) for n in range(2)))
    assert "a.jsonl: rows over several lines each; write one row per line: jq -c . a.jsonl" in refused(path, tmp_path)


def test_lines_of_json_that_call_themselves_text(tmp_path):
    run(write(tmp_path / "a.txt", chat(1)), tmp_path)
    assert len(rows(tmp_path)) == 1


def test_a_table_with_semicolons(tmp_path):
    """As spreadsheets write it where the comma stands in numbers."""
    run(write(tmp_path / "a.csv", "instruction;output", '"Why;\nwhy?";"1,5"'), tmp_path)
    assert [turn["content"] for turn in rows(tmp_path)[0]["messages"]] == ["Why;\nwhy?", "1,5"]
