"""Several machines that share a run's folder: their flags, who chooses, how they start together."""

import re
import socket
import threading
import time
from contextlib import suppress

import pytest
from click.testing import CliRunner
from results import empty_adapter

from fitune.cli import cli
from fitune.config import run as runs
from fitune.errors import FituneError, UsageError
from fitune.launching import machines, signs_of_life
from fitune.launching.machines import Machines, check_machine_flags
from fitune.launching.meeting_point import MeetingPoint
from fitune.planning.limits import given_machine
from fitune.planning.search import find

NO_PLACE = {"machine_rank": None, "main_process_ip": None, "main_process_port": None}


@pytest.fixture
def run(tmp_path):
    """A found run of two machines."""
    found = find("llama3_70b_lora", (), given_machine(2, 80, 256), machines=2, output=str(tmp_path / "run"))
    run = found.plan.run
    assert run.accelerate.num_machines == 2
    return run


@pytest.fixture
def at():
    """A port of this host that is free."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return MeetingPoint("127.0.0.1", free.getsockname()[1])


@pytest.fixture
def quickly(monkeypatch):
    monkeypatch.setattr(signs_of_life, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(machines, "LOST_SECONDS", 2)
    monkeypatch.setattr(machines, "PATIENCE_SECONDS", 1)
    monkeypatch.setattr(machines, "NO_RESTART_SECONDS", 1)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ({}, "the run takes 2 machines: give each of them --main-process-ip"),
        ({"machine_rank": 1}, "--main-process-ip, the address of machine 0, and --machine-rank, 0 to 1"),
        ({"machine_rank": 2, "main_process_ip": "a"}, "--machine-rank 2: there are 2 machines, 0 to 1"),
    ],
)
def test_missing_or_wrong_machine_flags_are_refused_at_once(place, said, run):
    with pytest.raises(UsageError, match=re.escape(said)):
        check_machine_flags(run, **NO_PLACE | place)


def test_machine_flags_that_suffice(run):
    check_machine_flags(run, **NO_PLACE | {"main_process_ip": "10.0.0.1"})  # the port is in accelerate.yaml
    known = run.accelerate.model_copy(update={"main_process_ip": "10.0.0.1"})
    check_machine_flags(run.model_copy(update={"accelerate": known}), **NO_PLACE | {"machine_rank": 1})
    no_port = known.model_copy(update={"main_process_port": 0})
    with pytest.raises(UsageError, match="the same --main-process-port"):
        check_machine_flags(run.model_copy(update={"accelerate": no_port}), **NO_PLACE)


@pytest.mark.parametrize("flags", [["--machine-rank", "1"], ["--main-process-ip", "10.0.0.1"]])
def test_train_eval_and_generate_take_machine_flags_for_several_machines_only(flags, tiny_base, tmp_path):
    one = runs.resolve("tiny_qlora", "cpu_2proc", (f"base.model={tiny_base}",), str(tmp_path / "one"))
    one.folder.mkdir()
    (one.folder / "run.yaml").write_text(runs.dump(one), encoding="utf-8")
    empty_adapter(one.result_folder)
    for words in (["eval"], ["generate", "--prompt", "x"], ["train", "--resume"]):
        result = CliRunner().invoke(cli, [*words, str(one.folder), *flags])
        assert result.exit_code == 2 and "are for several machines" in result.stderr, result.output


def test_eval_of_a_run_of_two_machines_without_an_address_is_refused_at_once(run):
    run.folder.mkdir()
    (run.folder / "run.yaml").write_text(runs.dump(run), encoding="utf-8")
    empty_adapter(run.result_folder)
    began = time.monotonic()
    result = CliRunner().invoke(cli, ["eval", str(run.folder)])
    assert result.exit_code == 2 and "give each of them --main-process-ip" in result.stderr
    assert time.monotonic() - began < 10


def test_machines_start_together_however_long_one_prepares(run, quickly, at):
    started = []
    run.folder.mkdir()

    def machine(rank: int, seconds: float) -> None:
        with Machines(run, rank, resume=False, at=at) as own:
            time.sleep(seconds)
            own.start_together()
            started.append((rank, time.monotonic()))
            while len(started) < 2:  # its ranks are running now
                time.sleep(0.1)

    threads = [threading.Thread(target=machine, args=place) for place in ((1, 0.0), (0, 3.0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(rank for rank, _ in started) == [0, 1]
    assert abs(started[0][1] - started[1][1]) < 2  # one was ready three seconds before
    assert not list((run.folder / "machines").glob("*.json"))


def test_machines_that_do_not_answer_are_named(run, quickly, at):
    run.folder.mkdir()
    with (
        Machines(run, 0, resume=False, at=at) as first,
        pytest.raises(FituneError, match=r"^machine 1 of 2 did not answer"),
    ):
        first.start_together()
    with pytest.raises(UsageError, match="machine 0 did not show itself there"):
        Machines(run, 1, resume=False, at=at).__enter__()


@pytest.mark.parametrize("rank", [0, 1])
def test_nobody_waits_for_a_machine_that_ended_with_an_error(rank, run, quickly, monkeypatch, at):
    monkeypatch.setattr(machines, "PATIENCE_SECONDS", 600)
    run.folder.mkdir()
    (run.folder / "run.yaml").write_text(runs.dump(run), encoding="utf-8")
    both_are_there, said = threading.Barrier(2), []

    def fails() -> None:
        with suppress(UsageError), Machines(run, 1 - rank, resume=False, at=at):
            both_are_there.wait(60)
            raise UsageError("no rows here")

    def waits() -> None:
        with Machines(run, rank, resume=False, at=at) as own:
            both_are_there.wait(60)
            try:
                own.start_together()
            except FituneError as error:
                said.append(str(error))
                raise

    other = threading.Thread(target=fails)
    other.start()
    with pytest.raises(FituneError):
        waits()
    other.join(60)
    assert said == [f"machine {1 - rank} of 2 ended with an error, which is printed there"]
    assert {file.name for file in (run.folder / "machines").glob("*.*")} == {"0.failed", "1.failed"}


@pytest.mark.parametrize(("code", "left"), [(0, []), (75, ["0.stopped"]), (1, ["0.failed"])])
def test_a_machine_whose_ranks_failed_says_so(code, left, run, at):
    run.folder.mkdir()
    with Machines(run, 0, resume=False, at=at) as own:
        own.ended_with(code)
    assert [file.name for file in (run.folder / "machines").glob("*.*")] == left


def test_a_machine_that_was_stopped_while_others_wait_may_come_again(run, quickly, at):
    """What it left when it was stopped does not end the ranks of the others later."""
    run.folder.mkdir()
    (run.folder / "run.yaml").write_text(runs.dump(run), encoding="utf-8")
    there = MeetingPoint(at.host, at.port)
    with Machines(run, 0, resume=False, at=at) as first:
        with suppress(KeyboardInterrupt), Machines(run, 1, resume=False, at=there):
            raise KeyboardInterrupt
        assert (run.folder / "machines" / "1.stopped").exists()
        with Machines(run, 1, resume=False, at=there) as again:
            together = threading.Thread(target=first.start_together)
            together.start()
            again.start_together()
            together.join(60)
            assert {file.name for file in (run.folder / "machines").glob("[01].*")} == {"0.json", "1.json"}
            for machine in (first, again):
                assert machine.noticed_while_ranks_run(None)._look(0) is None
                assert machine.noticed_while_ranks_run(None).names == [first.name, again.name]


def test_machine_0_decides_what_is_resumed_and_how_the_model_is_spread(run, quickly, tmp_path, at):
    run.folder.mkdir()
    (run.folder / "run.yaml").write_text(runs.dump(run), encoding="utf-8")
    fewer_rows = runs.with_numbers(run, micro_batch=1, kept_layers=0)
    with Machines(run, 0, resume=True, at=at), Machines(fewer_rows, 1, resume=False, at=at) as second:
        assert second.resume is True
        assert second.settings_of_machine_0(fewer_rows) == runs.load(run.folder)
        other = run.model_copy(update={"recipe": run.recipe.model_copy(update={"seed": 7})})
        with pytest.raises(UsageError, match="machine 0 has seed 42, machine 1 7; give all machines the same recipe"):
            second.settings_of_machine_0(other)


def test_a_machine_that_is_just_being_started_again_is_not_called_gone(run, quickly, monkeypatch, at):
    """It takes away what it had left before it shows itself anew."""
    monkeypatch.setattr(machines, "PATIENCE_SECONDS", 0)
    looks = iter([[1], [1], []])
    with Machines(run, 0, resume=False, at=at) as own:
        monkeypatch.setattr(own, "_lives", lambda rank: False)
        monkeypatch.setattr(own, "_missing", lambda: next(looks))
        own.start_together()
        monkeypatch.setattr(own, "_missing", lambda: [1])
        with pytest.raises(FituneError, match="machine 1 of 2 did not answer for"):
            own.start_together()


def test_what_a_dead_machine_0_left_does_not_mislead(run, quickly, at):
    """It was killed a moment ago: machine 1 takes it for alive, and follows when it is started again."""
    run.folder.mkdir()
    (run.folder / "run.yaml").write_text(runs.dump(run), encoding="utf-8")
    left = run.folder / "machines" / "0.json"
    left.parent.mkdir()
    left.write_text('{"session": "old", "resume": false, "ready": true}', encoding="utf-8")
    started = []

    def machine_1() -> None:
        with Machines(run, 1, resume=False, at=at) as own:
            own.settings_of_machine_0(run)
            own.start_together()
            started.append((own.session, own.resume))

    second = threading.Thread(target=machine_1)
    second.start()
    time.sleep(1)
    with Machines(run, 0, resume=True, at=at) as first:
        first.start_together()
        second.join(60)
        assert started == [(first.session, True)]


def test_an_address_where_machine_0_does_not_answer_is_refused_on_machine_0(run, quickly, monkeypatch):
    """Torch would try for a quarter of an hour."""
    monkeypatch.setattr(machines, "NAMED_WITHIN_SECONDS", 1)
    run.folder.mkdir()
    elsewhere = MeetingPoint("127.0.0.1", 9)
    monkeypatch.setattr(elsewhere, "open", lambda: None)
    said = r"^machine 0 does not answer at 127.0.0.1, port 9 \(Connection refused\): --main-process-ip is an address"
    with (
        pytest.raises(UsageError, match=said),
        Machines(run, 0, resume=False, at=elsewhere) as first,
    ):
        first.start_together()
    assert (run.folder / "machines" / "0.failed").exists()


def test_a_machine_waits_until_machine_0_answers_and_says_so(run, at, quickly, capsys):
    run.folder.mkdir()
    (run.folder / "run.yaml").write_text(runs.dump(run), encoding="utf-8")
    with Machines(run, 0, resume=False, at=at) as first, Machines(run, 1, resume=False, at=at) as second:
        at.close()
        together = [threading.Thread(target=machine.start_together) for machine in (first, second)]
        for thread in together:
            thread.start()
        time.sleep(0.8)
        at.open()
        for thread in together:
            thread.join(60)
    assert f"of 2: machine 0 does not answer at 127.0.0.1, port {at.port} (" in capsys.readouterr().err
    with socket.create_server(("", at.port)):
        pass  # ranks find it free


def test_a_port_that_is_taken_is_refused_before_machine_0_shows_itself(run, at):
    run.folder.mkdir()
    with (
        socket.create_server(("", at.port)),
        pytest.raises(UsageError, match=rf"^--main-process-port {at.port}: Address already in use on machine 0; give"),
    ):
        Machines(run, 0, resume=False, at=at).__enter__()
    assert not (run.folder / "machines").exists()
