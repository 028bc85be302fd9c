"""`--max-restarts`: which ends of a run are followed by another start, and the exit code that is left."""

import pytest

from fitune.errors import CRASHED, INTERRUPTED
from fitune.launching import launch
from fitune.planning.fill import resolve

SIGNALLED = 1


@pytest.mark.parametrize(
    ("ends", "most", "code", "resumed"),
    [
        ([(0, 0)], 2, 0, [False]),
        ([(CRASHED, 0), (0, 0)], 2, 0, [False, True]),
        ([(CRASHED, 0)] * 3, 2, 1, [False, True, True]),
        ([(CRASHED, 0)], 0, 1, [False]),
        ([(2, 0)], 2, 2, [False]),  # an error that was explained would only come again
        ([(INTERRUPTED, SIGNALLED)], 2, INTERRUPTED, [False]),
        ([(CRASHED, SIGNALLED)], 2, INTERRUPTED, [False]),  # told to stop while it started
        ([(CRASHED, 2)], 2, 1, [False]),  # told twice: ended at once, and not started again
    ],
)
def test_only_a_crash_is_followed_by_another_start(ends, most, code, resumed, monkeypatch, tmp_path):
    run = resolve("tiny_qlora", "cpu_2proc", (), str(tmp_path))
    left, starts = list(ends), []

    def once(run, resume, place, show):
        starts.append(resume)
        return left.pop(0)

    monkeypatch.setattr(launch, "_train_once", once)
    assert launch.train_with_restarts(run, resume=False, max_restarts=most, place={}) == code
    assert starts == resumed
