"""prepare: what other tools write about training, on turns, on rows, as pairs of answers; and thinking."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from preparing import ANSWER, QUESTION, chat, refused, rows, run, write
from tiny_tokenizer import tiny_tokenizer

from fitune.config.schema import Data, Recipe, Source
from fitune.data.chat_template import apply_chat_template_choice
from fitune.data.prepared import load_rows
from fitune.data.training_flags import trained_answers
from fitune.errors import UsageError

NO, YES = ({"role": "assistant", "content": text} for text in ("Bad.", "Good."))


def everything(tmp_path) -> list[dict]:
    return rows(tmp_path) + rows(tmp_path, "test")


def trained_text(tmp_path, tokenizer, **data) -> str:
    """What is trained of tmp_path/out, by the labels that training reads."""
    settings = Data(dataset="none", prepared=str(tmp_path / "out"), **data)
    recipe = Recipe.model_construct(data=settings, max_length=999, packing=True)
    found = load_rows(recipe, "train", tokenizer, tmp_path / "cache")
    return " ".join(tokenizer.decode([i for i in found[n]["labels"] if i != -100]) for n in range(len(found)))


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


PAIRS = {
    "texts": (
        {"prompt": "Why?", "chosen": "Good.", "rejected": "Bad."},
        {"columns": {"completion": "chosen"}, "format": "prompt_completion"},
        "--set 'data.columns={completion: chosen}' --format prompt_completion",
    ),
    "another question": (
        {"question": "Why?", "chosen": "Good.", "rejected": "Bad."},
        {"columns": {"prompt": "question", "completion": "chosen"}, "format": "prompt_completion"},
        "--set 'data.columns={prompt: question, completion: chosen}' --format prompt_completion",
    ),
    "whole conversations": (
        {"prompt": "Why?", "chosen": [QUESTION, YES], "rejected": [QUESTION, NO]},
        {"columns": {"messages": "chosen"}, "format": "messages"},
        "--set 'data.columns={messages: chosen}' --format messages",
    ),
    "whole conversations, LLaMA-Factory's second version": (
        {"chosen_messages": [QUESTION, YES], "rejected_messages": [QUESTION, NO]},
        {"columns": {"messages": "chosen_messages"}, "format": "messages"},
        "--set 'data.columns={messages: chosen_messages}' --format messages",
    ),
    "a turn after a conversation, as LLaMA-Factory's first version": (
        {
            "conversations": [{"from": "human", "value": "Why?"}],
            "chosen": {"from": "gpt", "value": "Good."},
            "rejected": {"from": "gpt", "value": "Bad."},
        },
        {"columns": {"prompt": "conversations", "completion": "chosen"}, "format": "prompt_completion"},
        "--set 'data.columns={prompt: conversations, completion: chosen}' --format prompt_completion",
    ),
    "OpenAI": (
        {"input": "Why?", "preferred_output": [YES], "non_preferred_output": [NO]},
        {"columns": {"prompt": "input", "completion": "preferred_output"}, "format": "prompt_completion"},
        "--set 'data.columns={prompt: input, completion: preferred_output}' --format prompt_completion",
    ),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_of_answers_are_named_in_one_line_whose_flags_train_the_good_one(kind, tmp_path):
    row, data, flags = PAIRS[kind]
    path = write(tmp_path / "a.jsonl", row)
    message = refused(path, tmp_path)
    assert message.splitlines()[0].startswith(f"{path}:1: preference data, ") and flags in message.splitlines()[0]
    assert "rows cannot be used" not in message
    run(path, tmp_path, data)
    assert [turn["content"] for turn in rows(tmp_path)[0]["messages"]] == ["Why?", "Good."]


def test_a_pair_after_messages_inside_an_object_is_taken_out_of_it(tmp_path):
    """As OpenAI's preference data has them."""
    row = {"input": {"messages": [QUESTION]}, "preferred_output": [YES], "non_preferred_output": [NO]}
    message = refused(write(tmp_path / "a.jsonl", row), tmp_path)
    assert "jq -c '{prompt: .input.messages, completion: .preferred_output}' writes them" in message
    run(
        write(tmp_path / "b.jsonl", {"prompt": row["input"]["messages"], "completion": row["preferred_output"]}),
        tmp_path,
    )
    assert [turn["content"] for turn in rows(tmp_path)[0]["messages"]] == ["Why?", "Good."]


def test_a_pair_without_a_question_is_no_conversation(tmp_path):
    row = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}
    assert "split 'chosen' into turns" in refused(write(tmp_path / "a.jsonl", row), tmp_path)


@pytest.mark.parametrize(
    ("column", "good", "bad", "keep"),
    [
        ("label", True, False, True),
        ("score", 4.5, 1.0, ">= 4"),
        ("rating", 5, 2, [4, 5]),
        ("kto_tag", True, False, "yes"),
    ],
)
def test_rated_answers_are_named_in_one_line_whose_flag_keeps_the_good_ones(column, good, bad, keep, tmp_path):
    first, second, third = ({"prompt": f"{n}?", "completion": f"{n}."} for n in range(3))
    path = write(tmp_path / "a.jsonl", first | {column: good}, second | {column: bad}, third | {column: good})
    line = refused(path, tmp_path).splitlines()[0]
    assert line.startswith(f"{path}:1: preference data, '{column}: {good}' rates the answer")
    shown = "true" if good is True else '">= 4"'
    assert f"--set 'data.keep={{{column}: {shown}}}'" in line
    report = run(path, tmp_path, {"keep": {column: keep}})
    assert report["dropped"] == {"not_kept": 1}
    assert sorted(row["messages"][1]["content"] for row in everything(tmp_path)) == ["0.", "2."]
    assert run(path, tmp_path, {"ignored_keys": [column]}, overwrite=True)["rows_kept"] == 3


def test_a_mixed_in_source_keeps_its_own_rows(tmp_path):
    write(tmp_path / "b.csv", "prompt,completion,label", "1?,1.,true", "2?,2.,false")
    mix = [Source(dataset=str(tmp_path / "b.csv"), keep={"label": True})]
    run(write(tmp_path / "a.jsonl", *map(chat, range(3))), tmp_path, {"mix": mix})
    assert len(everything(tmp_path)) == 4


def test_a_mistyped_comparison_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", chat(1))
    with pytest.raises(UsageError, match="keep: score: '> four': expected a comparison with a number"):
        run(path, tmp_path, {"keep": {"score": "> four"}})


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
