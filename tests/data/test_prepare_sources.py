"""prepare: what `datasets` saved, Arrow files, JSON with the rows under a key, splits by name, tables put together."""

import json

import datasets
import pyarrow
import pyarrow.feather
import pytest
from preparing import ANSWER, QUESTION, chat, refused, rows, run, write

from fitune.data import json_stream
from fitune.data.source_file import open_file


def questions(tmp_path, split="train") -> set[str]:
    return {row["messages"][0]["content"] for row in rows(tmp_path, split)}


def saved(*numbers) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(map(chat, numbers)))


def asked(*numbers) -> set[str]:
    return {f"Question {number}?" for number in numbers}


def test_a_saved_dataset(tmp_path):
    saved(*range(9)).save_to_disk(tmp_path / "in", num_shards=2)
    (tmp_path / "in" / "cache-1234.arrow").write_bytes(b"of datasets' own")
    report = run(tmp_path / "in", tmp_path)
    assert questions(tmp_path) | questions(tmp_path, "test") == asked(*range(9))
    assert not any("not read" in note for note in report["notes"])


def test_saved_splits(tmp_path):
    splits = {"train": saved(0, 1, 2, 3), "test": saved(4), "extra": saved(5, 6)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "in")
    report = run(tmp_path / "in", tmp_path)
    assert (questions(tmp_path), questions(tmp_path, "test")) == (asked(0, 1, 2, 3), asked(4))
    assert report["notes"][0] == f"not read, neither train nor test: {tmp_path / 'in' / 'extra'}"
    run(tmp_path / "in", tmp_path, {"train_split": "train+extra"}, overwrite=True)
    assert (questions(tmp_path), questions(tmp_path, "test")) == (asked(0, 1, 2, 3, 5, 6), asked(4))
    message = refused(tmp_path / "in", tmp_path / "other", {"train_split": "trian"})
    assert "in: saved by datasets, no split 'trian'; did you mean 'train'?" in message and "data.train_split" in message


def test_a_saved_folder_that_is_damaged(tmp_path):
    datasets.DatasetDict(train=saved(1, 2)).save_to_disk(tmp_path / "in", num_shards={"train": 2})
    (tmp_path / "in" / "train" / "data-00001-of-00002.arrow").unlink()
    assert "train: saved by datasets, and 1 of its 2 Arrow files are there" in refused(tmp_path / "in", tmp_path)
    (tmp_path / "in" / "dataset_dict.json").write_text("{}")
    assert "dataset_dict.json: not what datasets' save_to_disk writes" in refused(tmp_path / "in", tmp_path)


@pytest.mark.parametrize("name", ["a.arrow", "a.feather", "stream.arrow", "named_otherwise.bin"])
def test_arrow_files(name, tmp_path):
    table = pyarrow.Table.from_pylist(list(map(chat, range(5000))))
    if name == "stream.arrow":
        with pyarrow.ipc.new_stream(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    else:
        pyarrow.feather.write_feather(table, str(tmp_path / name), compression="uncompressed")
    assert run(tmp_path / name, tmp_path)["rows_kept"] == 5000


def test_parquet_by_another_name(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(map(chat, range(4)))), tmp_path / "a.json")
    assert run(tmp_path / "a.json", tmp_path)["rows_kept"] == 4


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a"])
@pytest.mark.parametrize("indent", [None, 0, 2])
def test_rows_under_a_key(name, indent, tmp_path):
    content = {"version": 12, "info": {"by": ["me"]}, "empty": [], "data": list(map(chat, range(5))), "more": 1.5}
    (tmp_path / name).write_text("\n" + json.dumps(content, indent=indent))
    run(tmp_path / name, tmp_path)
    assert questions(tmp_path) | questions(tmp_path, "test") == asked(*range(5))


def test_rows_under_a_key_are_named_by_their_true_line(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"data": [chat(1), {"messages": []}]}, indent=1))
    assert "a.json:15: no turn of the assistant" in refused(tmp_path / "a.json", tmp_path)


def test_keys_of_an_object_are_splits(tmp_path):
    content = {"train": [chat(1), chat(2)], "test": [chat(3)], "other": [chat(4)]}
    (tmp_path / "a.json").write_text(json.dumps(content, indent=1))
    report = run(tmp_path / "a.json", tmp_path)
    assert (questions(tmp_path), questions(tmp_path, "test")) == (asked(1, 2), asked(3))
    assert report["notes"][0] == f"not read, neither train nor test: {tmp_path / 'a.json'}: 'other'"
    run(tmp_path / "a.json", tmp_path, {"train_split": "train+other", "test_split": None}, overwrite=True)
    assert questions(tmp_path) | questions(tmp_path, "test") == asked(1, 2, 4)


def test_one_row_on_one_line_is_no_object_with_rows(tmp_path):
    assert run(write(tmp_path / "a.json", chat(1)), tmp_path)["rows_kept"] == 1
    assert run(write(tmp_path / "b.json", {"instruction": "Why?", "output": "So."}), tmp_path / "b")["rows_kept"] == 1


def test_a_row_over_several_lines_is_named(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(chat(1), indent=1))
    assert "one row over several lines; write one row per line: jq -c . a.json" in refused(
        tmp_path / "a.json", tmp_path
    )


def test_a_list_of_rows_that_calls_itself_jsonl(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(list(map(chat, range(4))), indent=1))
    assert run(tmp_path / "a.jsonl", tmp_path)["rows_kept"] == 4


def test_numbers_at_the_edge_of_a_block(tmp_path, monkeypatch):
    """The reader takes blocks of 1 MiB: a number may be cut in two."""
    for shift in range(4):
        head = '{"pad": "'
        text = (
            head + "x" * ((1 << 20) - len(head) - len('", "n": 12') - shift + 2) + '", "n": 123456, "data": [{"a": 1}]}'
        )
        (tmp_path / "a.json").write_text(text)
        with (tmp_path / "a.json").open("rb") as stream:
            found = json_stream.members_of_object(stream, "a.json")
            assert {key: member.first for key, member in found.items() if member.kind is list} == {"data": {"a": 1}}


def test_several_splits_of_a_folder(tmp_path):
    for name, number in (("train", 1), ("validation", 2), ("test", 3)):
        write(tmp_path / "in" / f"{name}.jsonl", chat(number))
    run(tmp_path / "in", tmp_path, {"train_split": "train+validation"})
    assert (questions(tmp_path), questions(tmp_path, "test")) == (asked(1, 2), asked(3))


def test_a_folder_that_prepare_wrote_is_a_source(tmp_path):
    from tiny_tokenizer import tiny_tokenizer

    run(write(tmp_path / "a.jsonl", *map(chat, range(8))), tmp_path, tokenizer=tiny_tokenizer(), max_length=99)
    (tmp_path / "out").rename(tmp_path / "first")
    run(tmp_path / "first", tmp_path)
    assert questions(tmp_path) | questions(tmp_path, "test") == asked(*range(8))


@pytest.mark.parametrize("first", ["messages", "alpaca"])
def test_columns_that_are_null_where_anothers_are_filled(first, tmp_path):
    given = [
        {"messages": [QUESTION, ANSWER], "instruction": None, "output": None},
        {"messages": None, "instruction": "Where?", "output": "Here."},
    ]
    table = pyarrow.Table.from_pylist(given if first == "messages" else given[::-1])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    run(tmp_path / "a.parquet", tmp_path)
    assert questions(tmp_path) | questions(tmp_path, "test") == {"Why?", "Where?"}


def test_what_a_file_is_is_found_out_once(tmp_path):
    file = open_file(write(tmp_path / "a.json", *map(chat, range(2))))
    assert (file.kind, file.lists, file.key) == ("jsonl", (), None)
