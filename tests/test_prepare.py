"""prepare: every usual format in, one schema out, bad rows named by file and true line, nothing left of a failure."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from rich.console import Console
from tiny_tokenizer import SPECIAL_TOKENS, tiny_tokenizer

from fitune.config import Data, Source
from fitune.data import conversations, file_formats, reading
from fitune.data.chat_template import apply_chat_template_choice
from fitune.data.data_report import check_prepared
from fitune.data.prepare import prepare
from fitune.errors import UsageError
from fitune.yaml_file import parse

EXAMPLES = Path(__file__).parents[1] / "examples" / "instructions" / "instructions.jsonl"


def chat(number, answer="Yes.") -> dict:
    return {"messages": [{"role": "user", "content": f"Question {number}?"}, {"role": "assistant", "content": answer}]}


def write(path: Path, *lines) -> Path:
    """Lines as they are given (bytes, str) or as JSON."""
    encoded = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


def run(source, tmp_path, data=None, **options) -> dict:
    """prepare with `source` as the dataset into tmp_path/out; `data`: further fields of the recipe's data block."""
    settings = Data(dataset=str(source), prepared="unused", **(data or {}))
    return prepare(settings, tmp_path / "out", **options)


def rows(tmp_path, split="train") -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "out" / f"{split}.jsonl").read_text("utf-8").splitlines()]


def refused(source, tmp_path, data=None, **options) -> str:
    """The message of the error; checks that nothing was left behind."""
    with pytest.raises(UsageError) as caught:
        run(source, tmp_path, data, **options)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    return str(caught.value)


QUESTION = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be brief."}
PARTS = {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "value": "y?"}]}
TURNS = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
FORMATS = {
    "messages": ({"messages": [SYSTEM, QUESTION, ANSWER]}, [SYSTEM, QUESTION, ANSWER]),
    "messages in parts": ({"messages": [PARTS, ANSWER]}, [QUESTION, ANSWER]),
    "no_robots": (
        {"prompt": "Why?", "prompt_id": "a1", "messages": [QUESTION, ANSWER], "category": "Open QA"},
        [QUESTION, ANSWER],
    ),
    "sharegpt": ({"id": "1", "conversations": TURNS}, [QUESTION, ANSWER]),
    "sharegpt with system": ({"system": "Be brief.", "conversations": TURNS}, [SYSTEM, QUESTION, ANSWER]),
    "alpaca": ({"instruction": "Why?", "input": "", "output": "Because."}, [QUESTION, ANSWER]),
    "alpaca with input": (
        {"instruction": "Translate.", "input": "Warum?", "output": "Why?"},
        [{"role": "user", "content": "Translate.\n\nWarum?"}, {"role": "assistant", "content": "Why?"}],
    ),
    "alpaca with history": (
        {"instruction": "Why?", "output": "Because.", "history": [["Hi", "Hello"]], "system": "Be brief."},
        [SYSTEM, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, QUESTION, ANSWER],
    ),
    "prompt and completion": ({"prompt": "Why?", "completion": "Because."}, [QUESTION, ANSWER]),
    "prompt and completion as turns": (
        {"prompt": [SYSTEM, QUESTION], "completion": [ANSWER]},
        [SYSTEM, QUESTION, ANSWER],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "jsonl.gz", "jsonl.zst", "json.gz"])
def test_every_format_in_every_kind_of_file(name, kind, tmp_path):
    row, expected = FORMATS[name]
    path = tmp_path / f"data.{kind}"
    other = json.loads(json.dumps(row).replace("Because", "Therefore").replace("Translate", "Interpret"))
    content = [row, other]
    if kind == "parquet":
        if name == "messages in parts":
            pytest.skip("a Parquet column cannot hold both text and parts")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
    else:
        text = "".join(json.dumps(one) + "\n" for one in content) if "jsonl" in kind else json.dumps(content, indent=1)
        with pyarrow.output_stream(path, compression={"gz": "gzip", "zst": "zstd"}.get(kind.split(".")[-1])) as file:
            file.write(text.encode())
    report = run(path, tmp_path)
    assert report["rows_kept"] == 2
    assert {"messages": expected} in rows(tmp_path) + rows(tmp_path, "test")


def test_csv_with_quoted_newlines_and_lists_as_json(tmp_path):
    table = tmp_path / "data.csv"
    table.write_bytes(
        b"\xef\xbb\xbfinstruction,output,history\r\n"
        b'"Two\r\nlines?",Yes,"[[""Hi"", ""Hello""]]"\r\n'
        b"\r\n"
        b"Empty?,,\r\n"
        b"Few\r\n"
        b"Last?,No,\r\n"
    )
    message = refused(table, tmp_path)
    assert f"{table}:5: 'instruction'" not in message
    assert f"{table}:5: output: the assistant's content is empty" in message
    assert f"{table}:6: 1 fields where the header has 3" in message
    assert "2 of 4 rows cannot be used" in message
    run(table, tmp_path, drop_invalid=True)
    written = rows(tmp_path) + rows(tmp_path, "test")
    assert [message["content"] for message in max(written, key=lambda row: len(row["messages"]))["messages"]] == [
        "Hi",
        "Hello",
        "Two\r\nlines?",
        "Yes",
    ]


def test_tool_calls_are_kept(tmp_path):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
    openai = {
        "tools": [{"type": "function", "function": {"name": "weather"}}],
        "messages": [
            QUESTION,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "rain"},
            ANSWER,
        ],
    }
    sharegpt = {
        "tools": json.dumps(openai["tools"]),
        "conversations": [
            {"from": "human", "value": "Why?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Ulm"}}'},
            {"from": "observation", "value": "sun"},
            {"from": "gpt", "value": "Because."},
        ],
    }
    write(tmp_path / "in" / "a.jsonl", openai)
    write(tmp_path / "in" / "b.jsonl", sharegpt)
    report = run(tmp_path / "in", tmp_path, tokenizer=tiny_tokenizer())
    first, second = sorted(rows(tmp_path) + rows(tmp_path, "test"), key=lambda row: "Ulm" in json.dumps(row))
    assert first["messages"][1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Bonn"}'}
    assert first["messages"][2] == {"role": "tool", "content": "rain", "tool_call_id": "c1"}
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert json.loads(first["tools"]) == json.loads(second["tools"]) == openai["tools"]
    assert report["tokens"]["total"] > 0


def test_columns_can_be_mapped(tmp_path):
    path = write(tmp_path / "dolly.jsonl", *[{"ask": f"{n}?", "context": "c", "response": "r"} for n in range(5)])
    message = refused(path, tmp_path)
    assert f"{path}:1: no known format has the columns 'ask', 'context', 'response'" in message
    assert "data.columns: {output: response}" in message
    run(path, tmp_path, {"columns": {"instruction": "ask", "input": "context", "output": "response"}})
    assert rows(tmp_path)[0]["messages"][1] == {"role": "assistant", "content": "r"}


def test_mistyped_column_names_the_nearest(tmp_path):
    path = write(tmp_path / "a.jsonl", chat(1))
    assert "did you mean 'instruction'?" in refused(path, tmp_path, {"columns": {"instruktion": "x"}})


def test_format_can_be_named(tmp_path):
    row = chat(1) | {"prompt": "P?", "completion": "C"}
    path = write(tmp_path / "a.jsonl", row, row | {"prompt": "Q?"})
    run(path, tmp_path, format="prompt_completion")
    assert {rows(tmp_path)[0]["messages"][0]["content"], rows(tmp_path, "test")[0]["messages"][0]["content"]} == {
        "P?",
        "Q?",
    }
    assert "did you mean 'sharegpt'" in refused(path, tmp_path / "other", format="sharegpd")


def test_system_message_is_added_where_there_is_none(tmp_path):
    own = {"messages": [{"role": "system", "content": "Mine."}, QUESTION, ANSWER]}
    empty = {"messages": [{"role": "system", "content": " "}, QUESTION | {"content": "2"}, ANSWER]}
    run(write(tmp_path / "a.jsonl", chat(1), own, empty), tmp_path, {"system_message": "Be brief."})
    first = [row["messages"][0]["content"] for row in rows(tmp_path) + rows(tmp_path, "test")]
    assert sorted(first) == ["Be brief.", "Be brief.", "Mine."]


# The nasty folder: each line with the reason it must be refused for.
NASTY = [
    ("invalid_json", '{"messages": [', "invalid JSON"),
    ("invalid_json", "[" * 100_000, "invalid JSON"),
    ("wrong_type", "[1, 2]", "expected an object"),
    ("not_utf8", b'{"messages": [{"role": "user", "content": "\xff"}]}', "not UTF-8: byte 0xff at byte 43 of the line"),
    ("not_utf8", {"messages": [{"role": "user", "content": "\ud800"}, ANSWER]}, "lone surrogate"),
    ("wrong_type", {"messages": "hello"}, "expected a list"),
    ("wrong_type", {"messages": [QUESTION, "Because."]}, "expected an object with 'role' and 'content', found text"),
    ("wrong_type", {"messages": [QUESTION, {"role": "assistant", "content": 4}]}, "expected text, found a number"),
    ("wrong_type", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "only text"),
    ("missing_field", {"text": "hello"}, "no 'messages'; the row has 'text'"),
    ("missing_field", {"messages": [{"content": "x"}, ANSWER]}, "no 'role'"),
    ("missing_field", {"messages": [QUESTION, {"role": "assistant"}]}, "messages[1]: no 'content'"),
    ("null_content", {"messages": None}, "'messages' is null"),
    ("null_content", {"messages": [QUESTION, ANSWER | {"content": None}]}, "messages[1]: 'content' is null"),
    ("empty_answer", {"messages": [QUESTION, ANSWER | {"content": " \n"}]}, "the assistant's content is empty"),
    ("empty_turn", {"messages": [{"role": "user", "content": ""}, ANSWER]}, "the user's content is empty"),
    ("unknown_role", {"messages": [{"role": "usr", "content": "x"}, ANSWER]}, "unknown role 'usr'; allowed: system"),
    ("roles_out_of_order", {"messages": [QUESTION, QUESTION, ANSWER]}, "messages[1]: 'user' after 'user'"),
    ("roles_out_of_order", {"messages": [ANSWER, QUESTION, ANSWER]}, "messages[0]: 'assistant' after the start"),
    ("roles_out_of_order", {"messages": [QUESTION, SYSTEM, ANSWER]}, "'system' after 'user'"),
    ("roles_out_of_order", {"messages": [QUESTION, ANSWER, QUESTION]}, "the last turn is the user's"),
    ("no_assistant", {"messages": [QUESTION]}, "no turn of the assistant"),
    ("no_assistant", {"messages": []}, "no turn of the assistant"),
    ("control_token", {"messages": [{"role": "user", "content": "a<|eot_id|>b"}, ANSWER]}, "control token <|eot_id|>"),
    ("already_rendered", {"messages": [{"role": "user", "content": "[INST] x [/INST]"}, ANSWER]}, "already rendered"),
    ("already_rendered", {"messages": [QUESTION, {"role": "assistant", "content": "<|im_start|>user\nx"}]}, "rendered"),
    (
        "already_rendered",
        {"messages": [{"role": "user", "content": "<|start_header_id|>user<|end_header_id|>\n\nx"}, ANSWER]},
        "already rendered",
    ),
    ("already_rendered", {"messages": [{"role": "user", "content": "<|user|>\nx</s>"}, ANSWER]}, "already rendered"),
    (
        "control_token",
        {"messages": [QUESTION, ANSWER | {"tool_calls": [{"id": "<|eot_id|>", "function": {"name": "f"}}]}]},
        "messages[1].tool_calls: the text holds the control token <|eot_id|>",
    ),
    (
        "wrong_type",
        {"messages": [QUESTION, ANSWER | {"tool_calls": [{"function": {"name": "f", "arguments": '"{}"'}}]}]},
        "arguments of 'f' are not a JSON object",
    ),
    ("untrained_turn", {"messages": [QUESTION, ANSWER | {"weight": 0}]}, "'weight: 0'"),
    ("untrained_turn", {"messages": [QUESTION, ANSWER | {"loss_weight": 0.0}]}, "'loss_weight: 0'"),
    ("wrong_type", {"messages": [QUESTION, {"role": "assistant", "content": [{"type": "text"}]}]}, "has no 'text'"),
    ("wrong_type", {"messages": [QUESTION, ANSWER], "images": ["a.png"]}, "'images' holds 1"),
    ("wrong_type", {"messages": [QUESTION, ANSWER | {"tool_calls": [{"function": {}}]}]}, "function with a 'name'"),
    ("wrong_type", {"messages": [QUESTION, ANSWER], "tools": "x"}, "expected a list"),
]


def test_turns_are_numbered_as_in_the_file(tmp_path):
    """Also where a system message is added, or an empty one left out."""
    empty_answer = [QUESTION, ANSWER, QUESTION, ANSWER | {"content": ""}]
    path = write(tmp_path / "a.jsonl", {"messages": empty_answer}, {"messages": [SYSTEM | {"content": ""}, ANSWER]})
    message = refused(path, tmp_path, data={"system_message": "Be brief."})
    assert "a.jsonl:1: messages[3]: the assistant's content is empty" in message
    assert "a.jsonl:2: messages[1]: 'assistant' after 'system'" in message


def test_functions_of_old_openai_files_are_tools(tmp_path):
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": ""}}
    result = {"role": "ipython", "content": "3"}
    path = write(tmp_path / "a.jsonl", *map(chat, range(3)),
                 {"messages": [QUESTION, call, result, ANSWER], "functions": [{"name": "f"}]})  # fmt: skip
    run(path, tmp_path)
    [row] = [row for row in rows(tmp_path) + rows(tmp_path, "test") if "tools" in row]
    assert json.loads(row["tools"]) == [{"type": "function", "function": {"name": "f"}}]
    assert row["messages"][1]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert row["messages"][2]["role"] == "tool"


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_every_bad_row_is_named_by_its_true_line(tmp_path, with_tokenizer):
    lines = [chat(0)]
    for number, (_, line, _) in enumerate(NASTY, start=1):
        lines += [line, "", chat(number)]
    path = write(tmp_path / "nasty.jsonl", *lines)
    tokenizer = tiny_tokenizer() if with_tokenizer else None
    message = refused(path, tmp_path, tokenizer=tokenizer)
    for number, (reason, _, words) in enumerate(NASTY):
        line = next((one for one in message.splitlines() if one.startswith(f"  {path}:{2 + 3 * number}: ")), None)
        assert line is not None, f"line {2 + 3 * number} ({reason}) is not named"
        assert words in line
    assert f"{len(NASTY)} of {2 * len(NASTY) + 1} rows cannot be used" in message
    assert "--drop-invalid" in message and "--escape-control-tokens" in message

    report = run(path, tmp_path, drop_invalid=True, tokenizer=tokenizer)
    assert report["dropped"] == {reason: len([1 for r, _, _ in NASTY if r == reason]) for reason, _, _ in NASTY}
    assert report["rows_in"] == report["rows_kept"] + sum(report["dropped"].values())
    assert report["rows_kept"] == len(NASTY) + 1
    assert any(f"{path}:2: invalid JSON" in line for line in report["examples"]["invalid_json"])


def test_byte_offset_is_that_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(file_formats, "CHUNK_BYTES", 100)
    monkeypatch.setattr(reading, "SERIAL_BYTES", 0)
    good = b"".join(json.dumps(chat(number)).encode() + b"\n" for number in range(50))
    bad = b'{"messages": "\xc3("}\n'
    for name, opener in (("a.jsonl", open), ("b.jsonl.gz", gzip.open)):
        with opener(tmp_path / name, "wb") as file:
            file.write(good + bad + good)
        message = refused(tmp_path / name, tmp_path)
        assert f"{tmp_path / name}:51: not UTF-8: byte 0xc3 at byte 14 of the line" in message
        assert f"byte offset {len(good) + 14} of the file" in message


def test_the_first_20_and_the_total_of_each_reason(tmp_path):
    path = write(tmp_path / "a.jsonl", *["{"] * 30, chat(1), *["[]"] * 3)
    message = refused(path, tmp_path)
    assert "33 of 34 rows" in message
    assert "invalid_json: 30, the first 20:" in message
    assert message.count("invalid JSON") == 20
    assert "wrong_type: 3\n" in message


def test_bom_blank_lines_and_crlf_are_accepted(tmp_path):
    lines = [json.dumps(chat(number)) for number in range(4)]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    report = run(tmp_path / "a.jsonl", tmp_path)
    assert (report["rows_in"], report["rows_kept"], report["dropped"]) == (4, 4, {})


def test_rows_over_10_mib_are_refused_and_never_held(tmp_path, monkeypatch):
    monkeypatch.setattr(file_formats, "MAX_ROW_BYTES", 2000)
    monkeypatch.setattr(file_formats, "CHUNK_BYTES", 500)
    monkeypatch.setattr(reading, "SERIAL_BYTES", 0)
    large = chat(1, answer="x" * 5000)
    lines = [chat(0), large, chat(2), large, chat(3)]
    for name in ("a.jsonl", "b.jsonl.gz", "c.json"):
        path = tmp_path / name
        text = json.dumps(lines, indent=0) if name == "c.json" else "\n".join(map(json.dumps, lines)) + "\n"
        with (gzip.open if name.endswith("gz") else open)(path, "wb") as file:
            file.write(text.encode())
        message = refused(path, tmp_path)
        assert "too_large: 2" in message and "2 of 5 rows" in message
        if name != "c.json":
            assert f"{path}:2: " in message and f"{path}:4: " in message
            assert "not_utf8" not in message


def test_json_list_names_the_line_where_it_breaks(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([chat(1), chat(2)], indent=1).replace('"Yes."', '"Yes.'))
    assert f"{path}:10: invalid JSON: Invalid control character" in refused(path, tmp_path)
    path.write_text("[" + json.dumps(chat(1)) + "\n\n" + json.dumps(chat(2)) + "]")
    assert f"{path}:3: invalid JSON: expected ','" in refused(path, tmp_path)
    path.write_text("[" + json.dumps(chat(1)))
    assert "the file ends" in refused(path, tmp_path)
    path.write_bytes(b'[{"a": "' + b"x" * 30 + b'\xff"}]')
    assert "not UTF-8: byte offset 38 of the file" in refused(path, tmp_path)


def test_lines_of_a_json_list_are_true(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[\n" + ",\n\n".join(json.dumps(row) for row in (chat(1), {"messages": []}, chat(2))) + "\n]")
    assert f"{path}:4: no turn of the assistant" in refused(path, tmp_path)


def test_jsonl_that_calls_itself_json(tmp_path):
    assert run(write(tmp_path / "a.json", *map(chat, range(4))), tmp_path)["rows_kept"] == 4


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"\xff\xfe{\x00", "not UTF-8 but UTF-16"),
        ("a.jsonl.gz", gzip.compress(b"{}\n" * 9999, mtime=0)[:-20], "truncated or damaged gzip file"),
        ("a.parquet", b"PAR1 not really", "not a readable Parquet file"),
        ("a.csv", b'instruction,output\n"never closed,x\n', "a.csv:2: not valid CSV"),
        ("a.xlsx", b"x", "unknown kind of file; allowed: .jsonl, .ndjson, .json, .parquet, .csv, .tsv"),
        ("a.jsonl", b"", "no rows left to train on"),
        ("a.json", b"[]", "no rows left to train on"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    message = refused(tmp_path / name, tmp_path)
    assert expected in message and "\n" not in message


def test_a_folder_of_nasty_files_names_them_all(tmp_path):
    folder = tmp_path / "in"
    good = [json.dumps(chat(number)).encode() for number in range(3000)]
    write(folder / "a.jsonl", *good[:10], "{")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join([b"[]", *good]))[:-20])
    (folder / "c.json").write_text(f"[\n{json.dumps(chat(1))},\n{{'single': 'quotes'}}]")
    (folder / "d.parquet").write_bytes(b"PAR1")
    (folder / "e.jsonl").write_bytes("{}".encode("utf-16"))
    write(folder / "f.csv", "instruction,output", "Why?,")
    write(folder / "g.jsonl", {"text": "<s>hello"})
    with pyarrow.output_stream(folder / "h.jsonl.zst", compression="zstd") as file:
        file.write(b"\n".join(good))
    (folder / "h.jsonl.zst").write_bytes((folder / "h.jsonl.zst").read_bytes()[:-50])
    for options in ({}, {"drop_invalid": True}):
        message = refused(folder, tmp_path, workers=1, **options)
        assert "b.jsonl.gz: truncated or damaged gzip file" in message
        assert "c.json:3: invalid JSON: Expecting property name" in message
        assert "d.parquet: not a readable Parquet file" in message
        assert "e.jsonl: not UTF-8 but UTF-16" in message
        assert "g.jsonl:1: no known format has the columns 'text'" in message
        assert "h.jsonl.zst: truncated or damaged zstd file" in message
        assert ("a.jsonl:11: invalid JSON" in message) is (not options)
        assert ("f.csv:2: output: the assistant's content is empty" in message) is (not options)


def test_files_that_are_not_read_are_mentioned(tmp_path):
    folder = tmp_path / "in"
    write(folder / "train.jsonl", *map(chat, range(4)))
    write(folder / "validation.jsonl", *map(chat, range(4, 6)))
    (folder / "more.txt").write_text("hello")
    report = run(folder, tmp_path)
    assert report["rows_in"] == 4
    assert (
        report["notes"][0] == f"not read, neither train nor test: {folder / 'more.txt'}, {folder / 'validation.jsonl'}"
    )


def test_a_file_of_both_splits_is_refused(tmp_path):
    write(tmp_path / "in" / "train" / "test.jsonl", *map(chat, range(4)))
    assert "its name says both 'train' and 'test'; rename" in refused(tmp_path / "in", tmp_path)


def test_csv_rows_over_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(file_formats, "MAX_ROW_BYTES", 2000)
    path = write(tmp_path / "a.csv", "instruction,output", "Why?,ok", "Why?," + "x" * 9000, "Who?,ok", b"Wh\xffo?,ok")
    message = refused(path, tmp_path)
    assert f"{path}:3: a row is more than" in message
    assert f"{path}:5: not UTF-8: byte offset {path.read_bytes().index(0xFF)} of the file" in message


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "train.jsonl", chat(1))
    assert "no such file; did you mean 'train.jsonl'?" in refused(tmp_path / "trian.jsonl", tmp_path)


def test_folder_with_splits(tmp_path):
    folder = tmp_path / "in"
    write(folder / "train-00000.jsonl", *map(chat, range(10)))
    write(folder / "train-00001.jsonl", *map(chat, range(5, 15)))
    write(folder / "test.jsonl", chat(3), chat(99), chat(99))
    report = run(folder, tmp_path)
    assert (report["train_rows"], report["test_rows"], report["rows_in"]) == (14, 2, 23)
    assert report["dropped"] == {"duplicate": 6, "shared_with_test": 1}
    assert rows(tmp_path, "test") == [chat(3), chat(99)]
    assert chat(3) not in rows(tmp_path)
    assert len(report["source"]["files"]) == 3


def test_split_by_seed_is_exact_repeatable_and_disjoint(tmp_path):
    path = write(tmp_path / "a.jsonl", *map(chat, range(200)))
    (tmp_path / "1").mkdir(), (tmp_path / "2").mkdir(), (tmp_path / "3").mkdir()
    run(path, tmp_path / "1", {"test_fraction": 0.1}, seed=1)
    run(path, tmp_path / "2", {"test_fraction": 0.1}, seed=1)
    run(path, tmp_path / "3", {"test_fraction": 0.1}, seed=2)
    assert len(rows(tmp_path / "1", "test")) == 20
    assert rows(tmp_path / "1", "test") == rows(tmp_path / "2", "test") != rows(tmp_path / "3", "test")
    together = rows(tmp_path / "1") + rows(tmp_path / "1", "test")
    assert sorted(map(json.dumps, together)) == sorted(json.dumps(chat(number)) for number in range(200))
    train = [int(row["messages"][0]["content"].split()[1][:-1]) for row in rows(tmp_path / "1")]
    assert train == sorted(train)


def test_processes_give_the_same_as_one(tmp_path, monkeypatch):
    lines = EXAMPLES.read_text(encoding="utf-8").splitlines()
    path = write(tmp_path / "a.jsonl", *lines, "{", *lines[:7], "{")
    tokenizer = tiny_tokenizer()
    for name, chunk_bytes, serial_bytes in (("one", 1 << 22, 1 << 22), ("many", 5000, 0)):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(file_formats, "CHUNK_BYTES", chunk_bytes)
        monkeypatch.setattr(reading, "SERIAL_BYTES", serial_bytes)
        run(path, tmp_path / name, tokenizer=tokenizer, workers=2, drop_invalid=True, max_length=9999)
    for file in ("train.jsonl", "test.jsonl", "report.json"):
        assert (tmp_path / "one/out" / file).read_bytes() == (tmp_path / "many/out" / file).read_bytes()
    report = json.loads((tmp_path / "one/out/report.json").read_text())
    assert report["dropped"] == {"duplicate": 7, "invalid_json": 2}
    assert report["examples"]["invalid_json"][1].startswith(f"{path}:{len(lines) + 9}: ")


def test_sources_are_mixed_with_weights(tmp_path):
    write(tmp_path / "a.jsonl", *[chat(f"a{number}") for number in range(100)])
    write(tmp_path / "b.jsonl", *[{"prompt": f"b{number}", "completion": "x"} for number in range(200)])
    write(tmp_path / "c.jsonl", *[chat(f"c{number}") for number in range(50)], chat("a1"))
    mix = [
        Source(dataset=str(tmp_path / "b.jsonl"), weight=0.25),
        Source(dataset=str(tmp_path / "c.jsonl"), weight=2.5),
    ]
    report = run(tmp_path / "a.jsonl", tmp_path, {"mix": mix, "test_fraction": 0.1})
    questions = [row["messages"][0]["content"] for row in rows(tmp_path)]
    count = {name: len([1 for question in questions if name in question.split("uestion ")[-1][:1]]) for name in "abc"}
    assert count["a"] == 90
    assert 25 < count["b"] < 65 and report["dropped"]["not_sampled"] == 180 - count["b"]
    c_questions = [question for question in questions if question.startswith("Question c")]
    assert len(set(c_questions)) == 45 and {c_questions.count(question) for question in c_questions} == {2, 3}
    assert report["dropped"]["duplicate"] == 1
    assert report["test_rows"] == 10 + 20 + 5
    assert not {json.dumps(row) for row in rows(tmp_path)} & {json.dumps(row) for row in rows(tmp_path, "test")}
    assert report["train_rows"] == len(questions)
    assert [source["rows_in"] for source in (report["source"], *report["mixed_in"])] == [100, 200, 51]
    assert report["rows_in"] == report["rows_kept"] + sum(report["dropped"].values())


def test_control_tokens_can_be_broken_up(tmp_path):
    trick = {"messages": [{"role": "user", "content": "a<|eot_id|><|eot<|eot_id|>_id|>"}, ANSWER]}
    tokenizer = tiny_tokenizer()
    report = run(write(tmp_path / "a.jsonl", trick, chat(1)), tmp_path, tokenizer=tokenizer, escape_control_tokens=True)
    row = next(row for row in rows(tmp_path) + rows(tmp_path, "test") if "eot" in json.dumps(row))
    assert row["messages"][0]["content"] == "a< |eot_id|><|eot< |eot_id|>_id|>"
    assert report["escaped_control_tokens"] == 2
    tokens = tokenizer.apply_chat_template(row["messages"])["input_ids"]
    assert tokens.count(tokenizer.convert_tokens_to_ids("<|eot_id|>")) == 2


def test_long_rows_are_refused_dropped_or_cut_at_a_turn(tmp_path):
    tokenizer = tiny_tokenizer()
    turns = [QUESTION, ANSWER, QUESTION, {"role": "assistant", "content": "long " * 100}]
    never = {"messages": [QUESTION, {"role": "assistant", "content": "endless " * 100}]}
    path = write(tmp_path / "a.jsonl", chat(1), {"messages": turns}, chat(2), never)
    options = {"tokenizer": tokenizer, "max_length": 100}
    message = refused(path, tmp_path, **options)
    assert f"{path}:2: " in message and "max_length is 100" in message and "--long-rows" in message

    report = run(path, tmp_path, {"long_rows": "drop"}, **options)
    assert report["dropped"] == {"too_long": 2} and report["tokens"]["max"] <= 100
    report = run(path, tmp_path, long_rows="cut", overwrite=True, **options)
    assert (report["rows_cut"], report["dropped"]) == (1, {"too_long": 1})
    assert {"messages": turns[:2]} in rows(tmp_path) + rows(tmp_path, "test")
    assert "ends inside its first answer" in report["examples"]["too_long"][0]


def test_too_few_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", *map(chat, range(8)), chat(7))
    message = refused(path, tmp_path, global_batch_size=8)
    assert "7 training rows are fewer than one global batch of 8 (9 rows were read, dropped: 1 duplicate)" in message
    assert "no rows left" in refused(write(tmp_path / "b.jsonl", "{"), tmp_path, drop_invalid=True)


def test_existing_output_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", *map(chat, range(4)))
    run(path, tmp_path)
    before = (tmp_path / "out" / "report.json").read_bytes()
    with pytest.raises(UsageError, match=r"already exists.*--overwrite"):
        run(path, tmp_path)
    assert (tmp_path / "out" / "report.json").read_bytes() == before
    write(tmp_path / "a.jsonl", *map(chat, range(5)))
    assert run(path, tmp_path, overwrite=True)["rows_in"] == 5
    (tmp_path / "out" / "report.json").unlink()
    with pytest.raises(UsageError, match="was not written by prepare"):
        run(path, tmp_path, overwrite=True)
    assert (tmp_path / "out" / "train.jsonl").exists()


def test_failed_overwrite_keeps_what_was_there(tmp_path):
    path = write(tmp_path / "a.jsonl", *map(chat, range(4)))
    run(path, tmp_path)
    before = (tmp_path / "out" / "train.jsonl").read_bytes()
    write(path, "{")
    with pytest.raises(UsageError, match="cannot be used"):
        run(path, tmp_path, overwrite=True)
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == before
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_prepare_leaves_nothing(tmp_path, number):
    source = tmp_path / "pipe.jsonl"
    write(source, *[chat(n, "word " * 500) for n in range(8000)])
    program = (
        "import sys; from pathlib import Path; from fitune.config import Data\n"
        "from fitune.data import prepare, reading\n"
        "add = reading.Tally.add\n"
        "def slow(*given): print('reading', flush=True); import time; time.sleep(0.5); add(*given)\n"
        "reading.Tally.add = slow\n"
        f"prepare.prepare(Data(dataset={str(source)!r}, prepared='x'), Path({str(tmp_path / 'out')!r}), workers=2)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    assert process.stdout.readline() == b"reading\n"
    assert list(tmp_path.glob(".out.partial-*"))
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    assert b"ForkProcess" not in errors


def test_what_a_killed_prepare_left_is_removed_by_the_next(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write(tmp_path / f".out.partial-{gone.pid}" / "rows", "half")
    write(tmp_path / f".out.partial-{os.getppid()}" / "rows", "another process is still at it")
    run(write(tmp_path / "a.jsonl", *map(chat, range(4))), tmp_path)
    assert [path.name for path in tmp_path.glob(".out*")] == [f".out.partial-{os.getppid()}"]


def killed(chunk, shape):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_error(tmp_path, monkeypatch):
    from fitune.errors import FituneError

    monkeypatch.setattr(reading, "SERIAL_BYTES", 0)
    monkeypatch.setattr(reading, "check_in_worker", killed)
    path = write(tmp_path / "a.jsonl", *map(chat, range(4)))
    with pytest.raises(FituneError, match="a worker process died"):
        run(path, tmp_path, workers=2)
    assert not list(tmp_path.glob(".out*")) and not (tmp_path / "out").exists()


def test_report_of_the_shipped_examples(tmp_path):
    tokenizer = tiny_tokenizer()
    report = run(EXAMPLES, tmp_path, tokenizer=tokenizer, max_length=8192, global_batch_size=4)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert (report["rows_in"], report["rows_kept"], report["test_rows"]) == (427, 427, 21)
    encoded = tokenizer.apply_chat_template(
        [row["messages"] for row in rows(tmp_path)], return_dict=True, return_assistant_tokens_mask=True
    )
    assert report["tokens"]["total"] == sum(map(len, encoded["input_ids"]))
    assert report["tokens"]["trained"] == sum(map(sum, encoded["assistant_masks"]))
    assert sum(report["tokens"]["histogram"].values()) == report["train_rows"]
    assert report["steps_per_epoch"] == -(-report["packed_rows"] // 4)
    import hashlib

    assert report["source"]["sha256"] == hashlib.sha256(EXAMPLES.read_bytes()).hexdigest()
    assert report["template"] == {
        "choice": "llama3",
        "sha256": hashlib.sha256(tokenizer.chat_template.encode()).hexdigest(),
    }


def test_without_a_tokenizer_everything_but_the_tokens(tmp_path):
    report = run(EXAMPLES, tmp_path, template_choice="plain")
    assert report["tokens"] is None and report["tokenizer"]["sha256"] is None
    assert report["rows_kept"] == 427 and report["template"]["choice"] == "plain"
    assert any("no tokenizer" in note for note in report["notes"])
    with pytest.raises(UsageError, match="--preview needs the tokenizer"):
        run(EXAMPLES, tmp_path, preview=1, overwrite=True)


def test_data_prepared_with_another_tokenizer_or_template_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", *map(chat, range(4)))
    tokenizer = tiny_tokenizer()
    report = run(path, tmp_path, tokenizer=tokenizer)
    assert check_prepared(tmp_path / "out", tokenizer, "llama3", 99) == report
    with pytest.raises(UsageError, match=r"its longest row has \d+ tokens, max_length is 5"):
        check_prepared(tmp_path / "out", tokenizer, "llama3", 5)
    plain = tiny_tokenizer()
    apply_chat_template_choice(plain, "plain")
    with pytest.raises(UsageError, match=r"another chat template \(llama3, not plain\); .* --template plain"):
        check_prepared(tmp_path / "out", plain, "plain", 99)
    other = tiny_tokenizer((*SPECIAL_TOKENS, "<|more|>"))
    apply_chat_template_choice(other, "llama3")
    with pytest.raises(UsageError, match="prepared with another tokenizer"):
        check_prepared(tmp_path / "out", other, "llama3", 99)
    run(path, tmp_path, overwrite=True)
    assert check_prepared(tmp_path / "out", other, "llama3", 99)["tokens"] is None
    (tmp_path / "out" / "report.json").write_text("{")
    with pytest.raises(UsageError, match="not a report of prepare"):
        check_prepared(tmp_path / "out", other, "llama3", 99)
    assert check_prepared(tmp_path, other, "llama3", 99) is None


def test_a_parquet_row_may_not_be_larger_either(tmp_path):
    rows = [chat(number)["messages"] for number in range(4)] + [chat("x" * (11 << 20))["messages"]]
    pyarrow.parquet.write_table(pyarrow.table({"messages": rows}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"a\.parquet:5: 11\.0 MiB is more than the 10 MiB"):
        run(tmp_path / "a.parquet", tmp_path)


def test_a_csv_header_that_is_not_utf8_is_line_1(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"instruction,output,no\xff\na,b,c\n")
    with pytest.raises(UsageError, match=r"a\.csv:1: the header is not UTF-8: byte offset 21"):
        run(tmp_path / "a.csv", tmp_path)


def test_overwrite_deletes_nothing_that_prepare_did_not_write(tmp_path):
    run(write(tmp_path / "a.jsonl", *map(chat, range(4))), tmp_path)
    source = write(tmp_path / "out" / "raw.jsonl", *map(chat, range(4)))
    with pytest.raises(UsageError, match=r"out: holds raw\.jsonl, which prepare did not write"):
        run(source, tmp_path, overwrite=True)
    assert source.exists()


def test_a_first_row_of_no_format_is_one_bad_row(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "x"}, *map(chat, range(4)))
    with pytest.raises(UsageError, match=r"a\.jsonl:1: no 'messages'; the row has 'text'"):
        run(path, tmp_path)
    assert run(path, tmp_path, drop_invalid=True)["rows_kept"] == 4


def test_escaping_control_tokens_hides_no_rendered_text(tmp_path):
    rendered = chat("<|start_header_id|>user<|end_header_id|>Hi<|eot_id|>")
    path = write(tmp_path / "a.jsonl", *map(chat, range(4)), rendered)
    with pytest.raises(UsageError, match=r"a\.jsonl:5: messages\[\d\]: already rendered"):
        run(path, tmp_path, escape_control_tokens=True)


def test_tool_calls_that_begin_late_are_loaded(tmp_path):
    """The schema of a JSON file is otherwise guessed from its first 10 MB."""
    from fitune.config import Recipe
    from fitune.data.dataset import load_split

    function = {"name": "f", "arguments": "{}"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    late = {"messages": [{"role": "user", "content": "?"}, call], "tools": "[]"}
    with (tmp_path / "train.jsonl").open("w") as stream:
        for number in range(13):
            stream.write(json.dumps(chat(f"{number} " + "word " * 200_000)) + "\n")
        stream.write(json.dumps(late) + "\n")
    recipe = Recipe.model_construct(data=Data(dataset="none", prepared=str(tmp_path)))
    rows = load_split(recipe, "train", tmp_path / "cache")
    assert len(rows) == 14 and rows[13]["messages"][1]["tool_calls"][0]["function"]["name"] == "f"


def test_table_and_preview(tmp_path):
    console = Console(width=100, record=True, force_terminal=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    path = write(tmp_path / "a.jsonl", chat("[bold]one[/bold]", "Jawohl."), chat(2))
    run(path, tmp_path, tokenizer=tiny_tokenizer(), max_length=64, console=console, preview=1, seed=1)
    styled = console.export_text(styles=True, clear=False)
    text = console.export_text()
    shown = rows(tmp_path)[0]["messages"]
    assert "rows read" in text and "packed" not in text.split("rows read")[0]
    assert shown[0]["content"] in text
    assert f"\x1b[1;32m{shown[1]['content']}<|eot_id|>" in styled.replace("\x1b[0m\x1b[1;32m", "")


def test_a_preview_without_colours_marks_what_is_trained(tmp_path):
    console = Console(width=40, record=True, color_system=None, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    path = write(tmp_path / "a.jsonl", chat("word " * 20, "Jawohl."), chat(2))
    run(path, tmp_path, tokenizer=tiny_tokenizer(), max_length=256, console=console, preview=2, seed=1)
    text = console.export_text()
    first = rows(tmp_path)[0]["messages"]
    assert f"{first[0]['content'].strip()}<|eot_id|>" in text  # no line of the text is broken
    assert f"⟦{first[1]['content']}<|eot_id|>⟧" in text


def test_parquet_beside_jsonl(tmp_path):
    path = write(tmp_path / "a.jsonl", *map(chat, range(4)))
    run(path, tmp_path, parquet=True)
    table = pyarrow.parquet.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    assert [[{key: message[key] for key in ("role", "content")} for message in row["messages"]] for row in table] == [
        row["messages"] for row in rows(tmp_path)
    ]


def test_the_output_loads_as_a_dataset(tmp_path):
    from datasets import load_dataset

    run(EXAMPLES, tmp_path)
    files = {split: str(tmp_path / "out" / f"{split}.jsonl") for split in ("train", "test")}
    loaded = load_dataset("json", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert loaded["train"].column_names == ["messages"]
    assert loaded["test"][0]["messages"] == rows(tmp_path, "test")[0]["messages"]


def test_prepare_does_not_import_torch(tmp_path):
    program = (
        "import sys; from pathlib import Path; from fitune.config import Data\n"
        "from fitune.data.prepare import prepare\n"
        f"prepare(Data(dataset={str(EXAMPLES)!r}, prepared='x'), Path({str(tmp_path / 'out')!r}))\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])
    assert time.perf_counter() - begin < 30


def test_the_examples_in_the_docs_are_true():
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(\w+)` \| `(\{.*\})`", text, re.MULTILINE)
    assert [name for name, _ in shown] == list(conversations.FORMATS)
    for name, row in shown:
        row = json.loads(row)
        assert conversations.detect_format(row) == name
        conversations.check_turns(conversations.to_conversation(row, name)["messages"])
    tools = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL).group(1))
    conversations.check_turns(conversations.to_conversation(tools, "messages")["messages"])
    parse(Data, yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL).group(1))["data"], "docs/data.md")
    reasons = {reason for reason, _, _ in NASTY} | {"template_refused", "too_large", "too_long"}
    reasons |= {"duplicate", "shared_with_test", "not_sampled"}
    assert reasons <= set(re.findall(r"`(\w+)`", text))
