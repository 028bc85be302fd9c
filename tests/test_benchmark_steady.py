"""benchmarks/steady.py: what it says of steps, and what nvidia-smi told it."""

import os
import time

import pytest
from patience import PATIENCE_SECONDS

from benchmarks import steady


def _step(seconds: float, mhz: float) -> dict:
    return {"gpu_s": seconds, "mhz": mhz, "watts": 690.0, "retries": 0, "mallocs": 0}


def test_steps_of_a_low_clock_take_longer_and_as_many_cycles():
    found = steady.summary([_step(9.0, 1980), *[_step(1.0, 1500)] * 2, *[_step(1.2, 1500), _step(1.0, 1800)] * 3])
    assert found["seconds_apart"] == pytest.approx(0.2) and found["cycles_apart"] == pytest.approx(0, abs=1e-9)
    assert found["seconds_with_clock"] == -1 and len(found["steps"]) == 9


def test_steps_that_waited_take_more_cycles():
    found = steady.summary([_step(1.0, 1500)] * 5 + [_step(1.3, 1500)])
    assert found["seconds_apart"] == found["cycles_apart"] == pytest.approx(0.3)
    assert found["seconds_with_clock"] is None


def test_a_span_has_the_mean_of_its_samples(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    stamp = "$(date '+%Y/%m/%d %H:%M:%S.%3N')"
    lines = f'for mhz in 1500 1700; do echo "{stamp}, $mhz, 650.5, 55"; done'
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n{lines}\nexec sleep 60\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    began = time.time()
    with steady.Watched("1") as watched:
        while len(watched.samples) < 2 and time.time() < began + PATIENCE_SECONDS:
            time.sleep(0.01)
    assert watched.between(began - 1, time.time() + 1) == {"mhz": 1600, "watts": 650.5, "celsius": 55}
    assert "--id=1" in (tmp_path / "asked").read_text()
