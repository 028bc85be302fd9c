"""data.json: which rows a run was started with, whatever is prepared in their place later."""

import hashlib
import json

import pytest

from fitune.config import run as runs
from fitune.config.trained_rows import rows_at_the_start
from fitune.report.origin import write_origin


@pytest.fixture
def start(tmp_path):
    """Starts the run in tmp_path/run on whatever is in tmp_path/data, and gives its data.json."""
    folder, data = tmp_path / "run", tmp_path / "data"
    folder.mkdir()
    run = runs.resolve("tiny_qlora", "cpu_2proc", (f"data.prepared={data}",), str(folder))
    (folder / "run.yaml").write_text(runs.dump(run))

    def start(*, resumed=False) -> dict:
        write_origin(folder, {"data": sha256(data / "train.jsonl")}, resumed=resumed)
        return json.loads((folder / "data.json").read_text())

    return start


def sha256(file) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def prepared(folder, train: str, test: str = "held out", **report) -> dict:
    """The report of rows that are written to `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text(train)
    (folder / "test.jsonl").write_text(test)
    report |= {"files": {"train.jsonl": {"sha256": sha256(folder / "train.jsonl")}}}
    (folder / "report.json").write_text(json.dumps(report))
    return report


def test_the_report_and_the_hashes_of_the_rows_stay_with_the_run(start, tmp_path):
    report = prepared(tmp_path / "data", "mine", train_rows=1)
    kept = start()
    rows = {split: sha256(tmp_path / "data" / f"{split}.jsonl") for split in ("train", "test")}
    assert kept == {"rows": rows, "report": report}
    prepared(tmp_path / "data", "mine", test="others", train_rows=1)
    assert start(resumed=True) == kept, "the rows held out at the first start"
    assert rows_at_the_start(tmp_path / "run") == rows


def test_a_start_on_other_rows_keeps_those(start, tmp_path):
    """As after a start that was killed before it saved anything."""
    prepared(tmp_path / "data", "mine", train_rows=1)
    start()
    report = prepared(tmp_path / "data", "theirs", train_rows=2)
    assert start()["report"] == report


def test_a_report_of_other_rows_is_not_kept(start, tmp_path):
    prepared(tmp_path / "data", "mine")
    (tmp_path / "data" / "train.jsonl").write_text("changed by hand")
    assert start()["report"] is None
    (tmp_path / "data" / "report.json").unlink()
    (tmp_path / "data" / "test.jsonl").unlink()
    (tmp_path / "run" / "data.json").unlink()
    assert start() == {"rows": {"train": sha256(tmp_path / "data" / "train.jsonl"), "test": None}, "report": None}


def test_of_an_older_run_the_trained_rows_are_known(tmp_path):
    assert rows_at_the_start(tmp_path) == {}
    (tmp_path / "origin.json").write_text('{"identity": {"data": "1"}}')
    assert rows_at_the_start(tmp_path) == {"train": "1"}
    (tmp_path / "origin.json").write_text('{"identity": null}')
    (tmp_path / "data.json").write_text('{"rows": 7}')
    assert rows_at_the_start(tmp_path) == {}
