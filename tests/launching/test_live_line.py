"""The live line's parts at every width."""

import pytest

from fitune.launching.live_line import clock, live_line
from fitune.launching.run_status import RunStatus, loss_trend

NOW = 1000.0
LARGE_RUN = RunStatus(
    step=120, steps=1200, loss=1.83214, trend=-0.0412, learning_rate=1.92e-4, tokens_per_second=14_351.3,
    gpu_memory_gib=20.13, gpu_memory_planned_gib=21.64, ends_at=NOW + 2472, checkpoint=100,
)  # fmt: skip


def test_at_120_columns_all_is_said():
    assert live_line(LARGE_RUN, NOW, 119).plain == (
        "step 120/1,200  loss 1.8321 ↓0.041  lr 1.92e-04  14,351 tokens/s  20.1/21.6 GiB planned  "
        "0:41:12 left  checkpoint 100"
    )


def test_at_80_columns_all_is_said_more_shortly():
    assert live_line(LARGE_RUN, NOW, 79).plain == (
        "120/1200  loss 1.83↓  lr 2e-4  14.4k tok/s  20.1/21.6 GiB  41:12 left  ckpt 100"
    )


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (105, "step 120/1,200  loss 1.8321 ↓0.041  lr 2e-4  14,351 tokens/s  20.1/21.6 GiB  0:41:12 left  ckpt 100"),
        (78, "step 120/1,200  loss 1.83↓  lr 2e-4  14.4k tok/s  20.1/21.6 GiB  0:41:12 left"),
        (50, "120/1200  loss 1.83↓  14.4k tok/s  0:41:12 left"),
        (35, "120/1200  loss 1.83↓  0:41:12 left"),
        (20, "120/1200  loss 1.83↓"),
        (10, "120/1200"),
    ],
)  # fmt: skip
def test_what_matters_least_is_shortened_and_left_out_first(width, shown):
    assert live_line(LARGE_RUN, NOW, width).plain == shown


@pytest.mark.parametrize("width", range(5, 130))
def test_it_never_reaches_beyond_its_width(width):
    reading = RunStatus(doing="reading the base", total=39.2e9, done=1e9, in_bytes=True, began=NOW - 1)
    for status in (
        LARGE_RUN,
        reading,
        RunStatus(**vars(LARGE_RUN) | {"doing": "evaluating", "total": 12.0, "done": 3.0}),
    ):
        assert len(live_line(status, NOW, width).plain) <= width
    assert live_line(LARGE_RUN, NOW, width).plain.removeprefix("step ").startswith("120/1"[:width])


def test_what_is_read_has_its_speed_and_the_time_left():
    reading = RunStatus(doing="reading the base", total=39.2e9, done=9.8e9, in_bytes=True, began=NOW - 4.9)
    assert live_line(reading, NOW, 80).plain == "reading the base  25%  2.0 GB/s  0:00:15 left"


def test_what_has_no_known_end_has_the_time_it_takes_so_far():
    assert live_line(RunStatus(doing="joining 8 processes", began=NOW - 65), NOW, 80).plain == (
        "joining 8 processes  0:01:05"
    )


def test_a_terminal_without_arrows_gets_signs():
    assert "loss 1.8321 -0.041" in live_line(LARGE_RUN, NOW, 119, ascii_only=True).plain


@pytest.mark.parametrize(
    "losses, trend",
    [([], None), ([3.0], None), ([3.0, 2.0], -1.0), ([9, 3, 3, 2, 2], -1.0), ([99, *[4] * 5, *[5] * 5], 1.0)],
)
def test_the_trend_compares_the_last_losses_with_those_before(losses, trend):
    assert loss_trend(losses) == trend


def test_clock():
    assert [clock(seconds) for seconds in (0.4, 59.6, 3600, 90061)] == ["0:00:00", "0:01:00", "1:00:00", "25:01:01"]
