"""Machines of `eval` and `generate` find each other before ranks start, or say in a line why they don't."""

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
from fitune.launching import roll_call
from fitune.launching.launch import alone
from fitune.launching.roll_call import meet
from fitune.planning.limits import given_machine
from fitune.planning.search import find


@pytest.fixture(scope="module")
def found():
    return find("llama3_70b_lora", (), given_machine(2, 80, 256), machines=3, output="run").plan.run


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def at(port: int, rank: int, host: str = "127.0.0.1") -> dict:
    return {"machine_rank": rank or None, "main_process_ip": host, "main_process_port": port}


def in_threads(run, places: list[dict], seconds: float = 60) -> list[Exception | float]:
    """When each machine started, or what it said, by the order of `places`; each begins a moment after the last."""
    outcomes = [None] * len(places)

    def one(number: int, place: dict) -> None:
        try:
            with meet(run, place):
                pass
            outcomes[number] = time.monotonic()
        except FituneError as error:
            outcomes[number] = error

    threads = [threading.Thread(target=one, args=pair, daemon=True) for pair in enumerate(places)]
    for thread in threads:
        thread.start()
        time.sleep(0.3)
    for thread in threads:
        thread.join(seconds)
    return outcomes


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_machines_start_together_in_whatever_order_they_come_and_leave_the_port_free(order, found, port):
    started = in_threads(found, [at(port, rank) for rank in order])
    assert all(isinstance(when, float) for when in started), started
    with socket.create_server(("", port)):
        pass  # ranks take it


def test_one_machine_waits_for_nobody(tmp_path):
    one = runs.resolve("tiny_qlora", "cpu_2proc", (), str(tmp_path))
    with meet(one, {"machine_rank": None, "main_process_ip": None, "main_process_port": None}) as others:
        assert others.beside is alone


def test_an_address_that_is_not_machine_0s_is_refused_there_at_once(found, port):
    """Documentation addresses lead nowhere, and an unknown name is none."""
    with pytest.raises(UsageError, match=r"^machine 0 does not answer at no-such-host.invalid, port \d+ \("):
        meet(found, at(port, 0, "no-such-host.invalid"))
    with socket.create_server(("", port)), pytest.raises(UsageError, match="Address already in use on machine 0"):
        meet(found, at(port, 0))


def test_a_machine_0_that_is_not_there_is_said_at_once_and_given_up(found, port, monkeypatch, capsys):
    monkeypatch.setattr(roll_call, "PATIENCE_SECONDS", 1)
    with pytest.raises(UsageError, match=r"^machine 0 does not answer at 127\.0\.0\.1") as refused:
        meet(found, at(port, 1))
    assert capsys.readouterr().err == f"waiting for machine 0 of 3: {refused.value}\n"


def test_a_machine_0_that_ends_when_it_is_reached_is_told(found, port, monkeypatch):
    near, far = socket.socketpair()
    far.close()
    monkeypatch.setattr(roll_call.MeetingPoint, "connect", lambda _: near)
    with pytest.raises(FituneError, match=r"^machine 0 ended before all machines had come"):
        meet(found, at(port, 1))


def test_machines_that_do_not_come_are_named(found, port, monkeypatch, capsys):
    monkeypatch.setattr(roll_call, "PATIENCE_SECONDS", 2)
    first, second = in_threads(found, [at(port, 0), at(port, 1)])
    assert re.match("machine 2 of 3 did not come for 2 s; type the same on each", str(first))
    assert str(second).startswith("machine 0 ended before all machines had come")
    assert "waiting for machines 1, 2 of 3\n" in capsys.readouterr().err


def test_two_machines_of_one_number_are_refused(found, port):
    first, second, third = in_threads(found, [at(port, 0), at(port, 1), at(port, 1)])
    assert str(first) == "two machines say --machine-rank 1; give each its own, 0 to 2"
    assert isinstance(second, FituneError) and isinstance(third, FituneError)


def test_a_machine_that_was_stopped_and_comes_again_counts_once(found, port):
    started: list = []
    together = threading.Thread(target=lambda: started.extend(in_threads(found, [at(port, 0), at(port, 2)])))
    together.start()
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(roll_call._greeting(1, 3))
            break
    time.sleep(1)
    assert not started
    with meet(found, at(port, 1)):
        together.join(60)
    assert all(isinstance(when, float) for when in started) and len(started) == 2


def test_another_program_at_the_port_is_told(found, port):
    def greets(server: socket.socket) -> None:
        with server.accept()[0] as connection:
            connection.sendall(b"SSH-2.0-OpenSSH\r\n")
            connection.recv(100)

    with socket.create_server(("127.0.0.1", port)) as server:
        threading.Thread(target=greets, args=(server,), daemon=True).start()
        with pytest.raises(UsageError, match=rf"^127.0.0.1, port {port}: another program answers there"):
            meet(found, at(port, 1))


@pytest.mark.parametrize("words", [["eval"], ["generate", "--prompt", "x"]])
def test_eval_and_generate_say_so_in_one_line_before_ranks_start(words, found, port, tmp_path, monkeypatch):
    run = found.model_copy(update={"output_dir": str(tmp_path / "run")})
    run.folder.mkdir()
    (run.folder / "run.yaml").write_text(runs.dump(run), encoding="utf-8")
    empty_adapter(run.result_folder)
    monkeypatch.setattr(roll_call, "launch_until_stopped", lambda *_, **__: pytest.fail("started"))
    for module in ("eval_command", "generate_command"):
        monkeypatch.setattr(f"fitune.training.{module}.check_data", lambda *_, **__: None)
    place = ["--main-process-ip", "no-such-host.invalid", "--main-process-port", str(port)]
    result = CliRunner().invoke(cli, [*words, str(run.folder), *place])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    assert result.stderr.startswith("error: machine 0 does not answer at no-such-host.invalid")
