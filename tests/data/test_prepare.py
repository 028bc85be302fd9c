"""prepare: splits and mixes, long rows, what is left when it fails, its report and preview."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE_SECONDS
from preparing import (
    ANSWER,
    EXAMPLES,
    QUESTION,
    chat,
    recipe_for,
    refused,
    rows,
    run,
    write,
)
from rich.console import Console
from tiny_tokenizer import tiny_tokenizer

from fitune.config.recipe import Source
from fitune.data import file_formats, reading
from fitune.data.prepared import load_rows
from fitune.errors import UsageError


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


def test_a_row_of_exactly_max_length_fits(tmp_path):
    """Whether it came so, or was cut to it."""
    tokenizer = tiny_tokenizer()
    short, long = [QUESTION, ANSWER], [QUESTION, ANSWER, QUESTION, {"role": "assistant", "content": "long " * 100}]
    path = write(tmp_path / "a.jsonl", {"messages": short})
    exactly = run(path, tmp_path, tokenizer=tokenizer)["tokens"]["max"]
    options = {"tokenizer": tokenizer, "overwrite": True}
    assert run(path, tmp_path, max_length=exactly, **options)["tokens"]["max"] == exactly
    with pytest.raises(UsageError, match=f"{exactly} tokens, max_length is {exactly - 1}"):
        run(path, tmp_path, max_length=exactly - 1, **options)
    path = write(tmp_path / "a.jsonl", {"messages": long})
    report = run(path, tmp_path, max_length=exactly, long_rows="cut", **options)
    assert (report["rows_cut"], report["tokens"]["max"]) == (1, exactly)
    assert rows(tmp_path) == [{"messages": short}]


def test_a_cut_never_parts_a_call_from_its_result(tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    turns = [QUESTION, call, {"role": "tool", "content": "x"}, {"role": "assistant", "content": "long " * 100}]
    path = write(tmp_path / "a.jsonl", {"messages": turns}, chat(1), chat(2))
    report = run(path, tmp_path, tokenizer=tiny_tokenizer(), max_length=150, long_rows="cut", drop_invalid=True)
    assert (report["rows_cut"], report["dropped"]) == (0, {"too_long": 1})


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
        "import sys; from pathlib import Path; from fitune.config.recipe import Data\n"
        "from fitune.data import prepare, reading\n"
        "add = reading.Tally.add\n"
        "def slow(*given): print('reading', flush=True); import time; time.sleep(0.5); add(*given)\n"
        "reading.Tally.add = slow\n"
        f"prepare.prepare(Data(dataset={str(source)!r}, prepared='x'), Path({str(tmp_path / 'out')!r}), workers=2)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    assert process.stdout.readline() == b"reading\n"
    assert list(tmp_path.glob(".out.partial-*"))
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
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


@pytest.mark.parametrize(
    ("train_on", "trained"),
    [("all", ["One.", "Call.", "Two."]), ("last", ["Two."]), ("completion", ["Call.", "Two."])],
)
def test_train_on_says_which_answers_are_trained(train_on, trained, tmp_path):
    """The labels that training reads are those of the answers that are meant, and no others."""
    call = {"role": "assistant", "content": "Call.", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    ask, one, two = ({"role": "user", "content": "?"}, *({"role": "assistant", "content": c} for c in ("One.", "Two.")))
    row = {"messages": [ask, one, ask, call, {"role": "tool", "content": "x"}, two]}
    tokenizer = tiny_tokenizer()
    run(write(tmp_path / "a.jsonl", row), tmp_path, {"train_on": train_on}, tokenizer=tokenizer, max_length=999)
    rows = load_rows(recipe_for(tmp_path / "out", 999, train_on=train_on), "train", tokenizer, tmp_path / "cache")
    assert not (tmp_path / "cache").exists(), "the tokens that prepare wrote are mapped"
    text = " ".join(
        tokenizer.decode([i for i in r["labels"] if i != -100]) for r in (rows[n] for n in range(len(rows)))
    )
    assert [said for said in ("One.", "Call.", "Two.") if said in text] == trained


def test_a_split_without_rows_is_an_error(tmp_path):
    tokenizer = tiny_tokenizer()
    run(write(tmp_path / "a.jsonl", chat("Hi")), tmp_path, tokenizer=tokenizer, max_length=99)
    with pytest.raises(UsageError, match=r"out/test.jsonl: no rows; prepare held-out rows \(data.test_split or"):
        load_rows(recipe_for(tmp_path / "out"), "test", tokenizer, tmp_path / "cache")


def test_overwrite_deletes_nothing_that_prepare_did_not_write(tmp_path):
    run(write(tmp_path / "a.jsonl", *map(chat, range(4))), tmp_path)
    source = write(tmp_path / "out" / "raw.jsonl", *map(chat, range(4)))
    with pytest.raises(UsageError, match=r"out: holds raw\.jsonl, which prepare did not write"):
        run(source, tmp_path, overwrite=True)
    assert source.exists()


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


@pytest.mark.parametrize("colours", [{"color_system": None}, {"no_color": True, "force_terminal": True}])
def test_a_preview_without_colours_marks_what_is_trained(colours, tmp_path):
    console = Console(width=40, record=True, file=open(os.devnull, "w"), **colours)  # noqa: SIM115, PTH123
    path = write(tmp_path / "a.jsonl", chat("word " * 20, "Jawohl."), chat(2))
    run(path, tmp_path, tokenizer=tiny_tokenizer(), max_length=256, console=console, preview=2, seed=1)
    text = console.export_text()
    first = rows(tmp_path)[0]["messages"]
    assert f"{first[0]['content'].strip()}<|eot_id|>" in text  # no line of the text is broken
    assert f"⟦{first[1]['content']}<|eot_id|>⟧" in text and "green" not in text


def test_prepare_does_not_import_torch(tmp_path):
    program = (
        "import sys; from pathlib import Path; from fitune.config.recipe import Data\n"
        "from fitune.data.prepare import prepare\n"
        f"prepare(Data(dataset={str(EXAMPLES)!r}, prepared='x'), Path({str(tmp_path / 'out')!r}))\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
