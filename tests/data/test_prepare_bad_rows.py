"""prepare: every bad row named by file and true line, every file that cannot be read."""

import gzip
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from preparing import ANSWER, QUESTION, SYSTEM, chat, refused, rows, run, write
from tiny_tokenizer import tiny_tokenizer

from fitune.config.recipe import Data
from fitune.config.yaml_file import parse
from fitune.data import conversations, file_formats, reading, row_formats
from fitune.errors import UsageError

# The nasty folder: each line with the reason it must be refused for.
NASTY = [
    ("invalid_json", '{"messages": [', "invalid JSON"),
    ("invalid_json", "[" * 100_000, "invalid JSON"),
    ("invalid_json", f'{{"messages": {"1" * 5000}}}', "invalid JSON: a whole number of more than"),
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
    (
        "wrong_type",
        {"messages": [QUESTION, ANSWER | {"tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1e999}'}}]}]},
        "arguments of 'f': a number is infinite or not a number",
    ),
    ("wrong_type", {"messages": [QUESTION, ANSWER], "tools": '[{"x": NaN}]'}, "'tools': a number is infinite"),
    ("nothing_trained", {"messages": [QUESTION, ANSWER | {"weight": 0}]}, "every answer is flagged as not to be"),
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


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"\xff\xfe{\x00", "not UTF-8 but UTF-16"),
        ("a.jsonl.gz", gzip.compress(b"{}\n" * 9999, mtime=0)[:-20], "truncated or damaged gzip file"),
        ("a.parquet", b"PAR1 not really", "not a readable Parquet file"),
        ("a.csv", b'instruction,output\n"never closed,x\n', "a.csv:2: not valid CSV"),
        ("a.csv", b"instruction,output\ra,b\r", "a.csv:1: not valid CSV: a line ends with CR alone; end lines with LF"),
        ("a.xlsx", b"x", "a.xlsx: an Excel file; save it as CSV"),
        (
            "a.bin",
            b"x",
            "unknown kind of file; allowed: .jsonl, .ndjson, .json, .parquet, .arrow, .feather, .csv, .tsv",
        ),
        ("a.txt", b"x", 'plain text; write one {"text": ...} for each document as JSONL'),
        ("a.zip", b"PK", "an archive; unpack it and give the folder"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS, not the data: run"),
        ("a.jsonl", b"<!DOCTYPE html><html>", "a web page, not data: the download needs a login"),
        ("a.arrow", b"ARROW1 not really", "not a readable Arrow file"),
        ("a.json", b'{"a": [\n1]}', "one object with the lists 'a', the columns of a table; write one object per row"),
        ("a.json", b'{\n"a": 1}', "one row over several lines; write one row per line: jq -c . a.json"),
        ("a.json", b'{\n"a": [{"x": 1}]\n', "a.json:3: invalid JSON: expected ',', the file ends"),
        (
            "a.json",
            b'{"a": [{"x": 1}], "b": [{"x": 1}]}',
            "one object with the lists 'a', 'b'; name the one with the rows: --set data.train_split=a",
        ),
        ("a.jsonl", b"", "a.jsonl: no rows"),
        ("a.json", b"[]", "a.json: no rows"),
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
    write(folder / "g.jsonl", {"txt": "<s>hello"})
    with pyarrow.output_stream(folder / "h.jsonl.zst", compression="zstd") as file:
        file.write(b"\n".join(good))
    (folder / "h.jsonl.zst").write_bytes((folder / "h.jsonl.zst").read_bytes()[:-50])
    for options in ({}, {"drop_invalid": True}):
        message = refused(folder, tmp_path, workers=1, **options)
        assert "b.jsonl.gz: truncated or damaged gzip file" in message
        assert "c.json:3: invalid JSON: Expecting property name" in message
        assert "d.parquet: not a readable Parquet file" in message
        assert "e.jsonl: not UTF-8 but UTF-16" in message
        assert "g.jsonl:1: no known format has the columns 'txt'" in message
        assert "h.jsonl.zst: truncated or damaged zstd file" in message
        assert ("a.jsonl:11: invalid JSON" in message) is (not options)
        assert ("f.csv:2: output: the assistant's content is empty" in message) is (not options)


def test_csv_rows_over_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(file_formats, "MAX_ROW_BYTES", 2000)
    path = write(tmp_path / "a.csv", "instruction,output", "Why?,ok", "Why?," + "x" * 9000, "Who?,ok", b"Wh\xffo?,ok")
    message = refused(path, tmp_path)
    assert f"{path}:3: a row is more than" in message
    assert f"{path}:5: not UTF-8: byte offset {path.read_bytes().index(0xFF)} of the file" in message


@pytest.mark.parametrize(
    "row",
    ['"Why?","begin\n{}\nend"', 'Why?,"{}\nlost, tail"', 'Why?,"begin\n{}"', 'Why?,"a ""{}"" b\nmore"'],
)
def test_a_csv_row_of_several_lines_is_over_the_limit_as_a_whole(row, tmp_path, monkeypatch):
    """Its quotes go on as they were: what follows is neither changed nor taken for a row."""
    monkeypatch.setattr(file_formats, "MAX_ROW_BYTES", 2000)
    lines = [f"Who {number}?,ok {number}" for number in range(9)]
    path = write(tmp_path / "a.csv", "instruction,output", *lines, row.format("x" * 9000), "Last?,ok")
    assert f"{path}:11: a row is more than" in refused(path, tmp_path)
    report = run(path, tmp_path, drop_invalid=True)
    found = [row["messages"][0]["content"] for row in rows(tmp_path) + rows(tmp_path, "test")]
    assert sorted(found) == sorted([*(f"Who {number}?" for number in range(9)), "Last?"])
    assert report["rows_in"] == 11


def test_a_table_with_bytes_that_are_no_text(tmp_path):
    """Arrow does not look: the column says that it is UTF-8."""
    texts = pyarrow.array([b"Who?", b"Wh\xffo?", *(b"Why %d?" % n for n in range(8))], pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(texts), texts.buffers())
    answers = [f"ok {number}" for number in range(10)]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": column, "completion": answers}), tmp_path / "a.parquet")
    assert "a.parquet:2: not UTF-8: byte 0xff of a text" in refused(tmp_path / "a.parquet", tmp_path)
    assert run(tmp_path / "a.parquet", tmp_path, drop_invalid=True)["rows_in"] == 10


def test_rows_are_not_read_from_the_folder_that_they_replace(tmp_path):
    run(write(tmp_path / "a.jsonl", *map(chat, range(20))), tmp_path)
    [report] = tmp_path.rglob("report.json")
    before = {file.name: file.read_bytes() for file in report.parent.iterdir()}
    for source in (report.parent / "train.jsonl", report.parent):
        with pytest.raises(UsageError, match="which would be replaced; choose another --output"):
            run(source, tmp_path, overwrite=True)
    assert {file.name: file.read_bytes() for file in report.parent.iterdir()} == before


def test_control_tokens_can_be_broken_up(tmp_path):
    trick = {"messages": [{"role": "user", "content": "a<|eot_id|><|eot<|eot_id|>_id|>"}, ANSWER]}
    tokenizer = tiny_tokenizer()
    report = run(write(tmp_path / "a.jsonl", trick, chat(1)), tmp_path, tokenizer=tokenizer, escape_control_tokens=True)
    row = next(row for row in rows(tmp_path) + rows(tmp_path, "test") if "eot" in json.dumps(row))
    assert row["messages"][0]["content"] == "a< |eot_id|><|eot< |eot_id|>_id|>"
    assert report["escaped_control_tokens"] == 2
    tokens = tokenizer.apply_chat_template(row["messages"])["input_ids"]
    assert tokens.count(tokenizer.convert_tokens_to_ids("<|eot_id|>")) == 2


def test_too_few_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", *map(chat, range(8)), chat(7))
    message = refused(path, tmp_path, global_batch_size=8)
    assert "7 training rows are fewer than one global batch of 8 (9 rows were read, dropped: 1 duplicate)" in message
    assert "no rows left" in refused(write(tmp_path / "b.jsonl", "{"), tmp_path, drop_invalid=True)


def test_a_parquet_row_may_not_be_larger_either(tmp_path):
    rows = [chat(number)["messages"] for number in range(4)] + [chat("x" * (11 << 20))["messages"]]
    pyarrow.parquet.write_table(pyarrow.table({"messages": rows}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"a\.parquet:5: 11\.0 MiB is more than the 10 MiB"):
        run(tmp_path / "a.parquet", tmp_path)


def test_a_csv_header_that_is_not_utf8_is_line_1(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"instruction,output,no\xff\na,b,c\n")
    with pytest.raises(UsageError, match=r"a\.csv:1: the header is not UTF-8: byte offset 21"):
        run(tmp_path / "a.csv", tmp_path)


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


def test_the_examples_in_the_docs_are_true():
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(\w+)` \| `(\{.*\})`", text, re.MULTILINE)
    assert [name for name, _ in shown] == list(row_formats.FORMATS)
    for name, row in shown:
        row = json.loads(row)
        assert row_formats.detect_format(row) == name
        converted = row_formats.to_conversation(row, name)
        assert "text" in converted or conversations.check_turns(converted["messages"]) is None
    tools = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL).group(1))
    conversations.check_turns(row_formats.to_conversation(tools, "messages")["messages"])
    parse(Data, yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL).group(1))["data"], "docs/data.md")
    reasons = {reason for reason, _, _ in NASTY} | {"template_refused", "too_large", "too_long"}
    reasons |= {"duplicate", "shared_with_test", "not_sampled"}
    assert reasons <= set(re.findall(r"`(\w+)`", text))
