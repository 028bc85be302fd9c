"""prepare: every usual format in every kind of file, folders of them, one schema out."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from preparing import ANSWER, EXAMPLES, QUESTION, SYSTEM, chat, everything, refused, rows, run, write
from tiny_tokenizer import tiny_tokenizer

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


def test_thinking_and_calls_in_parts(tmp_path):
    """As the rows of LLaMA-Factory's second version, Anthropic's thinking beside them."""
    call = {"name": "look", "arguments": {"at": "sky"}}
    parts = [
        {"type": "thinking", "thinking": "Hm."},
        {"type": "text", "text": "I look."},
        {"type": "tool_call", "value": json.dumps(call)},
    ]
    result = {"role": "tool", "content": [{"type": "text", "value": "blue"}]}
    last = {"role": "assistant", "content": [{"type": "reasoning", "value": "So."}, {"type": "text", "value": "Blue."}]}
    row = {"messages": [QUESTION, {"role": "assistant", "content": parts}, result, last]}
    run(write(tmp_path / "data.jsonl", json.dumps(row)), tmp_path)
    [found] = rows(tmp_path)
    _, first, _, second = found["messages"]
    assert (first["content"], first["reasoning_content"]) == ("I look.", "Hm.")
    assert (second["content"], second["reasoning_content"]) == ("Blue.", "So.")
    [made] = first["tool_calls"]
    function = made["function"]
    assert (function["name"], json.loads(function["arguments"])) == ("look", {"at": "sky"})


def test_parts_of_a_table_are_those_of_the_lines(tmp_path):
    """A table gives each part the keys of all, and each call the arguments of all: null where a row has none."""
    calls = [{"name": name, "arguments": arguments} for name, arguments in (("look", {"at": "sky"}), ("go", {"to": 1}))]
    turns = [
        [
            {"type": "thinking", "thinking": "Hm."},
            {"type": "text", "text": "So."},
            {"type": "tool_call", "tool_call": call},
        ]
        for call in calls
    ]
    made = [{"messages": [QUESTION, {"role": "assistant", "content": parts}]} for parts in turns]
    for row, question in zip(made, "ab", strict=True):
        row["messages"] = [{"role": "user", "content": [{"type": "text", "text": question}]}, row["messages"][1]]
    found = []
    for name in ("data.jsonl", "data.parquet"):
        path = tmp_path / name
        if name.endswith("parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(made), path)
        else:
            write(path, *made)
        run(path, tmp_path, overwrite=bool(found))
        found.append(sorted(json.dumps(row) for row in everything(tmp_path)))
    assert found[0] == found[1] and '\\"at\\": \\"sky\\"}' in found[0][0]


@pytest.mark.parametrize(
    "beside",
    [{"reasoning_content": "Other."}, {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}],
    ids=lambda beside: next(iter(beside)),
)
def test_what_parts_say_is_not_said_beside_them(beside, tmp_path):
    parts = [
        {"type": "thinking", "value": "Hm."},
        {"type": "text", "value": "So."},
        {"type": "tool_call", "value": {"name": "look", "arguments": {}}},
    ]
    turn = {"role": "assistant", "content": parts} | beside
    file = write(tmp_path / "data.jsonl", {"messages": [QUESTION, turn]})
    said = f"messages[1]: '{next(iter(beside))}' stands beside parts of the content that say it, too"
    assert said in refused(file, tmp_path)


@pytest.mark.parametrize("kind", ["image_url", "thinking", "tool_call"])
def test_parts_that_no_question_can_hold_are_named(kind, tmp_path):
    question = {"role": "user", "content": [{"type": kind, "value": "Why?"}]}
    file = write(tmp_path / "data.jsonl", json.dumps({"messages": [question, ANSWER]}))
    assert f"messages[0]: only text can be trained on, found a part of type '{kind}'" in refused(file, tmp_path)


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


def test_bom_blank_lines_and_crlf_are_accepted(tmp_path):
    lines = [json.dumps(chat(number)) for number in range(4)]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    report = run(tmp_path / "a.jsonl", tmp_path)
    assert (report["rows_in"], report["rows_kept"], report["dropped"]) == (4, 4, {})


def test_lines_of_a_json_list_are_true(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[\n" + ",\n\n".join(json.dumps(row) for row in (chat(1), {"messages": []}, chat(2))) + "\n]")
    assert f"{path}:4: no turn of the assistant" in refused(path, tmp_path)


def test_jsonl_that_calls_itself_json(tmp_path):
    assert run(write(tmp_path / "a.json", *map(chat, range(4))), tmp_path)["rows_kept"] == 4


def test_files_that_are_not_read_are_mentioned(tmp_path):
    folder = tmp_path / "in"
    write(folder / "train.jsonl", *map(chat, range(4)))
    write(folder / "validation.jsonl", *map(chat, range(4, 6)))
    (folder / "more.txt").write_text("hello")
    report = run(folder, tmp_path)
    assert report["rows_in"] == 4
    unread = f"not read, neither train nor test: {folder / 'more.txt'}, {folder / 'validation.jsonl'}"
    assert report["notes"][0] == f"{unread}; --set data.test_split=validation holds out validation"
    held_out = run(folder, tmp_path, {"test_split": "validation"}, overwrite=True)
    assert (held_out["rows_in"], held_out["test_rows"]) == (6, 2)
    assert held_out["notes"][0] == f"not read, neither train nor test: {folder / 'more.txt'}"


def test_a_file_of_both_splits_is_refused(tmp_path):
    write(tmp_path / "in" / "train" / "test.jsonl", *map(chat, range(4)))
    assert "its name says both 'train' and 'test'; rename" in refused(tmp_path / "in", tmp_path)


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
