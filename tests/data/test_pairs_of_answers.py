"""Rows with two answers to compare, or with rated ones: named in one line, whose flags train the good ones."""

import pytest
from preparing import NO, QUESTION, YES, chat, everything, refused, rows, run, write

from fitune.config.recipe import Source
from fitune.errors import UsageError

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
