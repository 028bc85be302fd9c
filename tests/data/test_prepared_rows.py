"""What training finds of prepared rows: tokens made again where lines changed, what was prepared otherwise refused."""

import json
import shutil

import pytest
from preparing import (
    chat,
    recipe_for,
    run,
    write,
)
from tiny_tokenizer import SPECIAL_TOKENS, tiny_tokenizer

from fitune.data.chat_template import apply_chat_template_choice
from fitune.data.prepared import check_prepared, load_rows, rows_beyond, sha256_of_rows
from fitune.errors import UsageError


def test_changed_lines_are_tokenised_again(tmp_path):
    tokenizer = tiny_tokenizer()
    run(write(tmp_path / "a.jsonl", *map(chat, range(4))), tmp_path, tokenizer=tokenizer, max_length=999)
    lines = tmp_path / "out" / "train.jsonl"
    lines.write_text(lines.read_text().replace("Yes.", "Nay."))
    rows = load_rows(recipe_for(tmp_path / "out", 999), "train", tokenizer, tmp_path / "cache")
    assert "Nay." in tokenizer.decode(rows[0]["input_ids"]) and "Yes." not in tokenizer.decode(rows[0]["input_ids"])


def test_lines_without_tokens_are_tokenised_by_training_and_what_is_cut_is_counted(tmp_path):
    tokenizer = tiny_tokenizer()
    run(write(tmp_path / "a.jsonl", *(chat(n, "long " * 50) for n in range(3))), tmp_path)
    apply_chat_template_choice(tokenizer, "llama3")
    rows = load_rows(recipe_for(tmp_path / "out", 40), "train", tokenizer, tmp_path / "cache")
    assert max(len(rows[n]["input_ids"]) for n in range(len(rows))) == 40
    assert rows_beyond(40, rows) == 2  # one row is held out
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")}
    assert len(load_rows(recipe_for(tmp_path / "out", 99), "train", tokenizer, tmp_path / "cache")) == 2
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")} == made, "made once"


@pytest.mark.parametrize("packing", [True, False])
def test_rows_whose_answers_all_begin_beyond_the_longest_row_are_refused(packing, tmp_path):
    """Else nothing would be trained, or measured. `prepare` did not see these rows."""
    run(write(tmp_path / "a.jsonl", *map(chat, range(4))), tmp_path)
    lines, tokenizer = tmp_path / "out" / "train.jsonl", tiny_tokenizer()
    apply_chat_template_choice(tokenizer, "llama3")
    recipe = recipe_for(tmp_path / "out", 40).model_copy(update={"packing": packing})
    write(lines, *(chat("long " * 50) for _ in range(3)))
    with pytest.raises(UsageError, match=rf"{lines}: no row has an answer within max_length 40; set a larger one"):
        load_rows(recipe, "train", tokenizer, tmp_path / "cache")
    write(lines, *(chat("long " * 50) for _ in range(3)), chat(0))
    assert len(load_rows(recipe, "train", tokenizer, tmp_path / "cache")) > 1


@pytest.mark.parametrize(("max_length", "packing"), [(40, True), (999, False)])
def test_rows_are_laid_out_as_the_recipe_says_now(max_length, packing, tmp_path):
    """Not as `prepare` laid them out for another length, or packed."""
    tokenizer = tiny_tokenizer()
    report = run(write(tmp_path / "a.jsonl", *map(chat, range(9))), tmp_path, tokenizer=tokenizer, max_length=999)
    assert report["tokens"]["max"] <= 40
    recipe = recipe_for(tmp_path / "out", max_length).model_copy(update={"packing": packing})
    found = load_rows(recipe, "train", tokenizer, tmp_path / "cache")
    lengths = [len(found[n]["input_ids"]) for n in range(len(found))]
    assert sum(lengths) == report["tokens"]["total"]
    assert max(lengths) <= max_length
    assert len(found) == report["train_rows"] if not packing else len(found) > 1


def test_rows_are_known_by_their_bytes(tmp_path):
    """Wherever they lie; with a report or without."""
    run(write(tmp_path / "a.jsonl", *map(chat, range(4))), tmp_path, tokenizer=tiny_tokenizer())
    moved = shutil.copytree(tmp_path / "out", tmp_path / "moved")
    known = sha256_of_rows(tmp_path / "out", "train")
    assert sha256_of_rows(moved, "train") == known
    (moved / "report.json").unlink()
    assert sha256_of_rows(moved, "train") == known
    lines = moved / "train.jsonl"
    lines.write_text(lines.read_text().replace("Yes.", "Nay."))
    assert sha256_of_rows(moved, "train") != known


def test_data_prepared_in_another_way_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", *map(chat, range(4)))
    tokenizer = tiny_tokenizer()
    report = run(path, tmp_path, tokenizer=tokenizer)
    out = tmp_path / "out"
    assert check_prepared(recipe_for(out), tokenizer) == report
    longest = report["tokens"]["max"]
    check_prepared(recipe_for(out, max_length=longest), tokenizer)
    said = rf"its longest conversation has {longest} tokens, max_length is {longest - 1}"
    with pytest.raises(UsageError, match=said):
        check_prepared(recipe_for(out, max_length=longest - 1), tokenizer)
    with pytest.raises(UsageError, match=r"out: prepared with system_message none, not 'Be brief.'; prepare"):
        check_prepared(recipe_for(out, system_message="Be brief."), tokenizer)
    with pytest.raises(UsageError, match=r"out: prepared with train_on 'all', not 'last'; prepare the data again: "):
        check_prepared(recipe_for(out, train_on="last"), tokenizer)
    plain = tiny_tokenizer()
    apply_chat_template_choice(plain, "plain")
    with pytest.raises(UsageError, match=r"another chat template \(llama3, not plain\); "):
        check_prepared(recipe_for(out, chat_template="plain"), plain)
    other = tiny_tokenizer((*SPECIAL_TOKENS, "<|more|>"))
    apply_chat_template_choice(other, "llama3")
    with pytest.raises(UsageError, match="prepared with another tokenizer"):
        check_prepared(recipe_for(out), other)
    run(path, tmp_path, overwrite=True)
    assert check_prepared(recipe_for(out), other)["tokens"] is None
    file = out / "report.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 1}))
    with pytest.raises(UsageError, match="prepared by another version of fitune; prepare the data again"):
        check_prepared(recipe_for(out), other)
    file.write_text("{")
    with pytest.raises(UsageError, match="not a report of prepare"):
        check_prepared(recipe_for(out), other)
    assert check_prepared(recipe_for(tmp_path), other) is None
