"""prepare: what other tools write about training, on turns and on rows."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from preparing import (
    ANSWER,
    NO,
    QUESTION,
    YES,
    chat,
    everything,
    refused,
    rows,
    run,
    trained_text,
    write,
)
from tiny_tokenizer import tiny_tokenizer

from fitune.data.chat_template import apply_chat_template_choice
from fitune.data.training_flags import trained_answers

FLAGS = {
    "OpenAI, Mistral, Together": ({"weight": 0}, {"weight": 1}),
    "as decimals": ({"weight": 0.0}, {"weight": 1.0}),
    "Axolotl": ({"train": False}, {"train": True}),
    "Axolotl, of old": ({"training": False}, {}),
    "ms-swift": ({"loss": False}, {"loss": True}),
    "ms-swift, as numbers": ({"loss": 0}, {"loss": 1}),
    "torchtune": ({"masked": True}, {"masked": False}),
    "a mask": ({"mask": True}, {}),
    "a mask of the loss": ({"loss_mask": 0}, {"loss_mask": 1}),
    "as words": ({"train": "false"}, {"train": "true"}),
    "a table's nulls": ({"weight": 0, "train": None}, {"weight": None, "train": None}),
}


@pytest.mark.parametrize("tool", FLAGS)
def test_turns_flagged_off_are_masked(tool, tmp_path):
    off, on = FLAGS[tool]
    row = {"messages": [QUESTION, NO | off, QUESTION, YES | on]}
    tokenizer = tiny_tokenizer()
    run(write(tmp_path / "a.jsonl", row), tmp_path, tokenizer=tokenizer, max_length=999)
    assert rows(tmp_path) == [{"messages": [QUESTION, NO | {"train": False}, QUESTION, YES]}]
    trained = trained_text(tmp_path, tokenizer)
    assert "Good." in trained and "Bad." not in trained


@pytest.mark.parametrize(
    ("train_on", "off", "trained"),
    [
        ("all", 1, [True, False, True]),
        ("last", 1, [False, False, True]),
        ("last", 2, [False, False, False]),
        ("completion", 1, [False, False, True]),
        ("completion", 2, [False, True, False]),
    ],
)
def test_a_flag_takes_out_of_what_train_on_means(train_on, off, trained):
    """The last question is answered in two turns, as around a tool."""
    answers = [YES | ({"train": False} if number == off else {}) for number in range(3)]
    messages = [QUESTION, answers[0], QUESTION, answers[1], {"role": "tool", "content": "7"}, answers[2]]
    assert trained_answers(messages, train_on) == trained


def test_what_is_masked_stays_masked_where_training_tokenises(tmp_path):
    row = {"messages": [QUESTION, NO | {"weight": 0}, QUESTION, YES]}
    run(write(tmp_path / "a.jsonl", row), tmp_path)
    tokenizer = tiny_tokenizer()
    apply_chat_template_choice(tokenizer, "llama3")
    trained = trained_text(tmp_path, tokenizer)
    assert "Good." in trained and "Bad." not in trained


def test_the_preview_shows_what_is_masked(tmp_path):
    from io import StringIO

    from rich.console import Console

    out = StringIO()
    row = {"messages": [QUESTION, NO | {"weight": 0}, QUESTION, YES]}
    run(write(tmp_path / "a.jsonl", row), tmp_path, tokenizer=tiny_tokenizer(), preview=1, console=Console(file=out))
    assert "⟦Good.<|eot_id|>⟧" in out.getvalue() and "⟦Bad." not in out.getvalue()


def test_a_row_is_not_cut_down_to_what_is_masked(tmp_path):
    long = YES | {"content": "Good. " * 60}
    path = write(tmp_path / "a.jsonl", {"messages": [QUESTION, NO | {"weight": 0}, QUESTION, long]}, chat(1), chat(2))
    report = run(path, tmp_path, tokenizer=tiny_tokenizer(), max_length=60, long_rows="cut")
    assert report["dropped"] == {"too_long": 1}


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ({"weight": 0.5}, "messages[1]: 'weight: 0.5': a turn is trained (1) or not (0), nothing between"),
        ({"train": "maybe"}, "messages[1]: 'train': expected true, false, 1 or 0, found 'maybe'"),
        (
            {"train_turn": True},
            "messages[1]: 'train_turn' looks like a flag of what is trained, but it is not one that",
        ),
        ({"trainThis": 0}, "'trainThis' looks like a flag"),
        ({"train_detail": [{"begin_offset": 0, "train": False}]}, "'train_detail' looks like a flag"),
        ({"mask": 1}, "'mask: 1' means one thing in one tool and another in the next; rename it to 'train'"),
        ({"loss_mask": True}, "'loss_mask: True' means one thing"),
        ({"weight": 0, "train": True}, "'weight' and 'train' contradict each other"),
    ],
)
def test_flags_that_cannot_be_followed_are_named(flag, reason, tmp_path):
    row = {"messages": [QUESTION, ANSWER | flag, QUESTION, ANSWER]}
    message = refused(write(tmp_path / "a.jsonl", row), tmp_path)
    assert f"a.jsonl:1: {reason}" in message or reason in message
    if set(flag) & {"weight", "train_turn"} and len(flag) == 1:
        [key] = flag
        assert "name it in data.ignored_keys" in message
        run(tmp_path / "a.jsonl", tmp_path, {"ignored_keys": [key]})
        assert rows(tmp_path) == [{"messages": [QUESTION, ANSWER, QUESTION, ANSWER]}]


def test_a_question_cannot_be_trained(tmp_path):
    row = {"messages": [QUESTION | {"train": True}, ANSWER]}
    assert "'train: True' on a turn of the user: only answers" in refused(write(tmp_path / "a.jsonl", row), tmp_path)
    row = {"messages": [QUESTION | {"weight": 1}, ANSWER], "id": 3}
    run(write(tmp_path / "a.jsonl", row), tmp_path)
    assert rows(tmp_path) == [{"messages": [QUESTION, ANSWER]}]


@pytest.mark.parametrize(
    ("flag", "is_named"),
    [
        ({"weight": 0.3}, True),
        ({"train": False}, True),
        ({"loss": 0.31}, True),
        ({"mask": "assistant"}, True),
        ({"train_on_inputs": True}, True),
        ({"used_in_training": "no"}, True),
        ({"used_in_training": "yes"}, False),
        ({"weight": 1}, False),
        ({"train": True}, False),
        ({"mask": "User"}, False),
        ({"train_on_inputs": False}, False),
        ({"weight": None}, False),
        ({"training_set": "web"}, False),
    ],
)
def test_flags_of_a_row_are_named_unless_they_say_what_is_done_anyway(flag, is_named, tmp_path):
    path = write(tmp_path / "a.jsonl", chat(1), chat(2) | flag)
    if is_named:
        [key] = flag
        assert f"a.jsonl:2: '{key}: " in (message := refused(path, tmp_path))
        assert "looks like a flag of the whole row; keep the rows to train on, such as data.keep={" in message
        run(path, tmp_path, {"ignored_keys": [key]})
    else:
        run(path, tmp_path)
    assert len(everything(tmp_path)) == 2


@pytest.mark.parametrize("key", ["weights", "assistant_masks", "loss_weights", "completion_mask"])
def test_a_list_of_flags_belongs_into_the_turns(key, tmp_path):
    """OpenAI's name in the plural, and TRL's masks over tokens."""
    message = refused(write(tmp_path / "a.jsonl", chat(1), chat(2) | {key: [0, 1]}), tmp_path)
    assert f"a.jsonl:2: '{key}: '[0, 1]'' looks like a flag of the whole row; write for each turn whether" in message


def test_a_row_that_asks_for_another_template_is_refused(tmp_path):
    """TRL hands such columns to the template."""
    rows_of_trl = [chat(1), chat(2) | {"chat_template_kwargs": {"enable_thinking": False}}]
    path = write(tmp_path / "a.jsonl", *rows_of_trl, chat(3) | {"chat_template_kwargs": {"enable_thinking": None}})
    message = refused(path, tmp_path)
    assert "1 of 3 rows" in message and "a.jsonl:2: 'chat_template_kwargs: " in message
    run(path, tmp_path, {"ignored_keys": ["chat_template_kwargs"]})
    assert len(everything(tmp_path)) == 3


def test_prompt_and_completion_train_the_completion_alone(tmp_path):
    row = {"prompt": [QUESTION, NO, QUESTION], "completion": [YES]}
    tokenizer = tiny_tokenizer()
    run(write(tmp_path / "a.jsonl", row), tmp_path, tokenizer=tokenizer, max_length=999)
    trained = trained_text(tmp_path, tokenizer)
    assert "Good." in trained and "Bad." not in trained


def test_tool_calls_read_from_tables_lose_the_keys_that_the_table_filled_in(tmp_path):
    """A key that is null in all its rows' calls was in another row's; elements of lists are the row's own."""

    def row(name, arguments):
        call = {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": name, "arguments": arguments}}],
        }
        schema = {"type": "object", "properties": {key: {"type": "string"} for key in arguments}}
        return {
            "tools": [{"type": "function", "function": {"name": name, "parameters": schema}}],
            "messages": [QUESTION | {"content": name}, call, {"role": "tool", "content": "1"}, ANSWER],
        }

    given = [row("move", {"x": 0, "y": 1, "path": [1, None]}), row("weather", {"city": "Bonn", "at": {"hour": 3}})]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(given), tmp_path / "a.parquet")
    run(tmp_path / "a.parquet", tmp_path)
    for one in given:
        [found] = [r for r in everything(tmp_path) if r["messages"][0] == one["messages"][0]]
        function = one["messages"][1]["tool_calls"][0]["function"]
        assert json.loads(found["messages"][1]["tool_calls"][0]["function"]["arguments"]) == function["arguments"]
        assert json.loads(found["tools"]) == one["tools"]
    own_null = row("look", {"at": None})
    run(write(tmp_path / "b.jsonl", own_null), tmp_path, overwrite=True)
    assert '{"at": null}' in rows(tmp_path)[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
