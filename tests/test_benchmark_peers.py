"""benchmarks/peers.py reports what each run itself has measured."""

import argparse
import subprocess
import sys

from benchmarks import peers

ENTRY = peers.USUAL | {"name": "fitune 1B, one row", "recipe": "llama3_1b", "profile": "one", "model": "1b"}


def test_what_an_earlier_run_measured_in_the_same_folder_is_not_this_runs(tmp_path):
    options = argparse.Namespace(output=tmp_path, models=tmp_path, data={ENTRY["length"]: tmp_path})
    old = tmp_path / "fitune-1B-one-row" / "measurements.json"
    old.parent.mkdir()
    old.write_text("{}")
    *_, measured = peers._fitune(ENTRY, options)
    assert measured == old and not measured.exists()


def test_a_run_ends_once_it_has_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "SETTLES_SECONDS", 0)
    measured = tmp_path / "measurements.json"
    program = (
        f"import pathlib, time; print('here', flush=True); pathlib.Path({str(measured)!r}).touch(); time.sleep(600)"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = subprocess.Popen([sys.executable, "-c", program], text=True, **pipes)
    printed, _ = peers._until(measured, running, patience=100)
    assert printed == "here\n" and running.returncode
