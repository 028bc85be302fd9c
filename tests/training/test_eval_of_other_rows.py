"""Rows that were prepared after a run was started: `eval` measures them as another folder's."""

import hashlib
import json

import pytest
from click.testing import CliRunner
from results import empty_adapter

from fitune.cli import cli
from fitune.config import run as runs
from fitune.launching import roll_call
from fitune.launching.run_folder import finish
from fitune.training import eval_command


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """Asks for `eval` of tmp_path/run and returns what the ranks were started with, and what was printed."""
    started = []
    monkeypatch.setattr(roll_call, "launch_until_stopped", lambda run, module, *words, **_: started.append(words) or 0)
    monkeypatch.setattr(eval_command, "check_data", lambda run, **about: None)
    monkeypatch.setattr("fitune.training.manifest.find_damage", lambda folder: None)
    folder, data = tmp_path / "run", tmp_path / "data" / "mine"
    data.mkdir(parents=True)
    run = runs.resolve("tiny_qlora", "cpu_2proc", (f"data.prepared={data}",), str(folder))
    for place in (folder, folder / "checkpoints/checkpoint-1"):
        empty_adapter(place / "adapter")
    (folder / "run.yaml").write_text(runs.dump(run))
    finish(run, 1, 1.0)

    def evaluated(given: str = "", *flags) -> tuple[tuple[str, ...], str]:
        done = CliRunner().invoke(cli, ["eval", str(folder / given), *flags])
        assert done.exit_code == 0, done.output
        return started[-1], " ".join(done.output.split())

    return evaluated


def held_out(tmp_path, split: str, text: str) -> str:
    """Writes a split's rows into the prepared folder; their SHA-256."""
    (tmp_path / "data" / "mine" / f"{split}.jsonl").write_text(text)
    return hashlib.sha256(text.encode()).hexdigest()


def test_what_is_measured_of_them_does_not_take_the_place_of_eval_json(evaluated, tmp_path):
    rows = {split: held_out(tmp_path, split, f"{split} rows") for split in ("train", "test")}
    (tmp_path / "run" / "data.json").write_text(json.dumps({"rows": rows, "report": None}))
    held_out(tmp_path, "train", "more rows to train on")
    words, said = evaluated()
    assert words == () and "holds other rows" not in said
    held_out(tmp_path, "test", "other rows")
    words, said = evaluated()
    assert words == ("--data", str(tmp_path / "data" / "mine"))
    assert f"note: {tmp_path}/data/mine/test.jsonl holds other rows than when " in said
    assert "goes into eval-mine.json, and eval.json stays as it is" in said
    words, said = evaluated("checkpoints/checkpoint-1")
    assert words[2:] == ("--data", str(tmp_path / "data" / "mine"))
    assert "goes into eval-checkpoint-1-mine.json, and eval-checkpoint-1.json stays as it is" in said


def test_an_older_run_knows_the_rows_that_it_was_trained_on(evaluated, tmp_path):
    held_out(tmp_path, "test", "rows")
    assert evaluated()[0] == (), "nothing is known"
    (tmp_path / "run" / "origin.json").write_text(json.dumps({"identity": {"data": "1"}}))
    assert evaluated()[0] == (), "no training rows to compare with"
    held_out(tmp_path, "train", "other rows")
    assert evaluated()[0][0] == "--data" and "goes into eval-mine.json" in evaluated()[1]


def test_rows_that_are_given_are_measured(evaluated, tmp_path):
    other = tmp_path / "data" / "other"
    other.mkdir()
    (other / "test.jsonl").write_text("rows")
    (tmp_path / "run" / "data.json").write_text(json.dumps({"rows": {"test": "1"}}))
    held_out(tmp_path, "test", "other rows")
    words, said = evaluated("", "--data", str(other))
    assert words == ("--data", str(other)) and "holds other rows" not in said
