"""The lines of a run, and the status that its launcher reads, through the callbacks of a trainer."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from fitune.environment import HEARTBEATS, OUTPUT
from fitune.launching.run_status import read_status
from fitune.training.run_report import RunReport, table_header, table_row

ARGS = SimpleNamespace(use_cpu=True)
LOSS = {"loss": 1.832, "grad_norm": 0.7412, "learning_rate": 1.92e-4, "tokens_per_second": 14351.2}
ON_GPU = {"gpu_memory_gib": 20.13, "gpu_memory_planned_gib": 21.6}


@pytest.fixture
def report(tmp_path, monkeypatch) -> RunReport:
    monkeypatch.setenv(HEARTBEATS, str(tmp_path))
    monkeypatch.setattr("fitune.training.run_report.TELL_SECONDS", 0)
    return RunReport()


def state(step: int, *losses: float) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=1200, log_history=[{"loss": loss} for loss in losses])


def control(save: bool = False, evaluate: bool = False) -> SimpleNamespace:
    return SimpleNamespace(should_save=save, should_evaluate=evaluate)


def test_the_columns_stand_under_their_names_and_fit_80_columns():
    header, row = table_header(LOSS | ON_GPU), table_row("1,000,000/1,200,000"[-13:], LOSS | ON_GPU, 2472.0)
    assert len(header) == len(row) == 79
    assert [len(line) for line in (header, row)] == [79, 79]
    ends = [
        index for index in range(79) if header[index] != " " and (index == 78 or header[index + 1 : index + 3] == "  ")
    ]
    assert all(row[end] != " " for end in ends) and len(ends) == 7


def test_short_numbers(capsys, report):
    report.on_log(ARGS, state(120, 1.832), control(), logs=LOSS)
    report.on_log(ARGS, state(1200, 1.832), control(), logs=LOSS | {"grad_norm": 123.4, "learning_rate": 0.0})
    report.on_log(
        ARGS, state(1200), control(), logs={"eval_loss": 1.7, "eval_perplexity": 5.47, "eval_token_accuracy": 0.61}
    )
    report.on_log(ARGS, state(1200), control(), logs={"train_runtime": 4000.0})
    report.on_log(ARGS, state(1200), control(), logs={"something": "else"})
    assert capsys.readouterr().out.splitlines() == [
        "         step      loss  grad norm  learning rate   tokens/s      left",
        "    120/1,200    1.8320      0.741       1.92e-04     14,351",
        "  1,200/1,200    1.8320        123       0.00e+00     14,351",
        "  1,200/1,200  held out: loss 1.7000, perplexity 5.47, token accuracy 61.0%",
        "trained 1,200 steps in 1:06:40",
    ]


def test_the_launcher_reads_what_the_run_does(report, tmp_path: Path, monkeypatch):
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("fitune.training.run_report.time", clock)
    report.begin("joining 2 processes")
    assert read_status(tmp_path).doing == "joining 2 processes"
    with report.bar("reading the base", 100, in_bytes=True) as advance:
        advance(40)
        assert (read_status(tmp_path).done, read_status(tmp_path).total) == (40, 100)
    report.on_train_begin(ARGS, state(0), control())
    assert read_status(tmp_path).doing == "training 1,200 steps" and read_status(tmp_path).steps == 1200
    clock.now = 100.0  # the first step compiles
    report.on_step_end(ARGS, state(1), control())
    assert read_status(tmp_path).ends_at is None, "the first step is slower than the others"
    clock.now = 102.0
    report.on_step_end(ARGS, state(2), control(save=True, evaluate=True))
    assert read_status(tmp_path).ends_at == 102 + 2 * 1198
    report.on_log(ARGS, state(2, 2.0, 1.5), control(), logs=LOSS | ON_GPU)
    told = read_status(tmp_path)
    assert (told.doing, told.step, told.loss, told.trend) == ("evaluating", 2, 1.832, -0.5)
    assert (told.gpu_memory_gib, told.gpu_memory_planned_gib, told.checkpoint) == (20.13, 21.6, None)
    report.on_prediction_step(ARGS, state(2), control(), eval_dataloader=[0] * 4)
    assert (read_status(tmp_path).done, read_status(tmp_path).total) == (1, 4)
    report.on_evaluate(ARGS, state(2), control(save=True))
    assert read_status(tmp_path).doing == "saving"
    report.last_checkpoint = lambda: 2
    report.on_save(ARGS, state(2), control())
    assert (read_status(tmp_path).doing, read_status(tmp_path).checkpoint) == ("", 2)


@pytest.mark.parametrize("output, stages, lines", [("", True, True), ("live", False, True), ("quiet", False, False)])
def test_nothing_is_said_twice(output, stages, lines, monkeypatch, capsys):
    monkeypatch.setenv(OUTPUT, output)
    report = RunReport()
    report.begin("joining 2 processes")
    report.on_log(ARGS, state(1, 1.0), control(), logs=LOSS)
    printed = capsys.readouterr()
    assert bool(printed.err) == stages and bool(printed.out) == lines


def test_one_rank_of_a_machine_tells(report, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    other = RunReport()
    other.begin("joining")
    other.on_log(ARGS, state(1, 1.0), control(), logs=LOSS)
    assert read_status(tmp_path) is None and capsys.readouterr() == ("", "")
