"""The record of `make slurm-test`: how one is made, and what the committed ones say."""

import hashlib
import json
from pathlib import Path

import pytest
from record import Record

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
STATE = {"JobState": "COMPLETED", "Restarts": "1", "NodeList": "n[1-2]", "Partition": "all"}


class FakeCluster:
    def job_state(self, job: str) -> dict[str, str]:
        return STATE

    def command(self, *words: str) -> str:
        return "slurm-wlm 22.05.8\n"


def test_a_case_has_what_slurm_and_the_job_say_of_it_and_no_path_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(RESULTS.parent)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/slurmctld.log").write_text("a: JobId=4 begins\nb: JobId=44 begins\nc: Requeuing JobId=4\n")
    run = tmp_path / "lost-n2"
    (run / "checkpoints/checkpoint-9").mkdir(parents=True)
    Path(f"{run}-slurm.log").write_text(f" 10 %\r 20 %\rstep 1\n\nresult: {run}\n")
    record = Record(FakeCluster(), tmp_path / "slurm")
    case = record.add("n2 killed", "4", run, b"adapter", same_adapter_bytes=True)
    assert case["controller_log"] == ["a: JobId=4 begins", "c: Requeuing JobId=4"]
    assert case["job_log"] == ["step 1", "result: FOLDER/lost-n2"] and case["checkpoints_left"] == [9]
    assert case["adapter_sha256"] == hashlib.sha256(b"adapter").hexdigest() and case["Restarts"] == "1"

    file = record.write(tmp_path / "out")
    report = json.loads(file.read_text())
    assert file.name == f"slurm-{report['date']}.json" and report["ok"] and report["cases"] == [case]
    assert report["slurm"] == "slurm-wlm 22.05.8" and report["hardware"]["cores"] and report["commit"]
    failed = record.write(tmp_path / "out", f"{run} is gone")
    assert failed.name.startswith("failed-slurm-")
    assert (
        json.loads(failed.read_text())["error"] == "FOLDER/lost-n2 is gone" and not json.loads(failed.read_text())["ok"]
    )


@pytest.mark.parametrize("file", sorted(RESULTS.glob("slurm-*.json")), ids=lambda file: file.stem)
def test_committed_records_show_requeued_jobs_that_ended_with_the_bytes_of_the_undisturbed_one(file):
    report = json.loads(file.read_text())
    cases = {case["case"]: case for case in report["cases"]}
    failed, undisturbed = cases.pop("set-up that fails"), cases.pop("undisturbed")
    assert report["ok"] and failed["JobState"] == "FAILED" and failed["Restarts"] == "0"
    assert set(cases) == {"told to stop by scancel --signal=TERM", "n1 killed", "n2 killed"}
    for name, case in cases.items():
        assert case["JobState"] == "COMPLETED" and case["Restarts"] == "1" and "goes on after step" in case["resumed"]
        assert case["adapter_sha256"] == undisturbed["adapter_sha256"] and case["same_adapter_bytes"], name
        assert any("equeu" in line for line in case["controller_log"] + case["job_log"]), name
