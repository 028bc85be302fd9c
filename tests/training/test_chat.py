"""A conversation on the terminal: commands, Ctrl-C, and draws that differ unless a seed is given."""

import builtins
import json
import os
import signal
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer

from fitune.errors import UsageError
from fitune.training.answerer import Answerer
from fitune.training.chat import HELP, Interrupts, chat

CTRL_C = object()
QUESTION = [{"role": "user", "content": "River stone letter?"}]


@pytest.fixture
def typed(monkeypatch):
    """`typed(line, …)` is what the user types, CTRL_C among it; then the input ends."""

    def type_(*lines):
        left = list(lines)

        def read(prompt):
            if not left:
                raise EOFError
            line = left.pop(0)
            if line is not CTRL_C:
                return line
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("Ctrl-C did nothing")

        monkeypatch.setattr(builtins, "input", read)
        return left

    return type_


class Told:
    """Answers with the number of messages; `interrupted` does so after a Ctrl-C, if it is told to stop then."""

    tokenizer = SimpleNamespace(decode=str)

    def __init__(self, interruptions: int = 0):
        self.asked, self.interruptions = [], interruptions

    def answer(self, messages, streamer, stopping):
        self.asked.append([message["content"] for message in messages])
        for _ in range(self.interruptions):
            os.kill(os.getpid(), signal.SIGINT)
        stopped = stopping[0](torch.zeros(1, 3), None)
        assert stopped.tolist() == [self.interruptions > 0]
        return f"answer {len(messages)}"


def talk(answerer, system_message=None):
    before = signal.getsignal(signal.SIGINT)
    chat(answerer, system_message, Interrupts())
    assert signal.getsignal(signal.SIGINT) == before
    return answerer.asked


def test_what_was_said_is_remembered_until_reset(typed):
    typed("Hi", "", "More", "/reset", "New", "/exit", "never")
    assert talk(Told(), "Be brief.") == [
        ["Be brief.", "Hi"],
        ["Be brief.", "Hi", "answer 2", "More"],
        ["Be brief.", "New"],
    ]


def test_system_sets_a_message_and_begins_anew(typed, capsys):
    typed("Hi", "/system Be kind.", "Again", "/system", "Last")
    assert talk(Told()) == [["Hi"], ["Be kind.", "Again"], ["Last"]]
    assert "system message set" in capsys.readouterr().out


def test_save_writes_a_row_and_overwrites_nothing(typed, capsys, tmp_path):
    file = tmp_path / "talk.jsonl"
    typed("Hi", f"/save {file}", f"/save {file}", "/save", "/unknown")
    talk(Told())
    roles = [("user", "Hi"), ("assistant", "answer 1")]
    assert json.loads(file.read_text()) == {"messages": [{"role": r, "content": c} for r, c in roles]}
    said = capsys.readouterr().out
    assert f"saved: {file}\n{file}: not saved: File exists\n" in said
    assert said.count(HELP) == 3  # at the beginning, without a file, for a command that there isn't


@pytest.mark.parametrize("system_message", [None, "Be brief."])
def test_save_writes_nothing_before_anything_was_said(typed, capsys, tmp_path, system_message):
    file = tmp_path / "talk.jsonl"
    typed(f"/save {file}", "Hi", "/reset", f"/save {file}")
    talk(Told(), system_message)
    assert not file.exists()
    assert capsys.readouterr().out.count(f"{file}: not saved: nothing was said yet\n") == 2


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said(typed, capsys):
    typed("Hi", "More")
    assert talk(Told(interruptions=1)) == [["Hi"], ["Hi", "answer 1", "More"]]
    assert "Ctrl-C again ends the chat" in capsys.readouterr().out


@pytest.mark.parametrize(("interruptions", "lines"), [(2, ["Hi"]), (1, ["Hi", CTRL_C]), (0, [CTRL_C, CTRL_C])])
def test_ctrl_c_twice_ends_the_chat(typed, interruptions, lines):
    left = typed(*lines, "never")
    talk(Told(interruptions))
    assert left == ["never"]


def test_ctrl_c_counts_from_anew_after_every_line(typed):
    left = typed(CTRL_C, "Hi", CTRL_C, "More")
    assert len(talk(Told())) == 2 and not left


def test_ctrl_c_ends_what_is_being_loaded():
    interrupts = Interrupts()
    try:
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGINT)
        assert ended.value.code == 130
    finally:
        interrupts.restore()


def _type_slowly() -> list[list[str]]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=2))
    lines = ["Hi"]

    def read(prompt):
        time.sleep(4)
        if not lines:
            raise EOFError
        return lines.pop()

    builtins.input = read  # of this rank alone, a process of its own
    return talk(Told())


def test_ranks_wait_for_a_line_beyond_any_timeout():
    assert run_ranks(_type_slowly, 2) == [[["Hi"]]] * 2


def test_what_the_chat_template_refuses_is_said_and_forgotten(typed, capsys, tiny_base):
    """As those do that know no system message."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    answerer = Answerer(AutoModelForCausalLM.from_pretrained(tiny_base), tokenizer, [0], "cpu", 2, 0.0)
    with pytest.raises(UsageError, match=r"^the model's chat template refuses this conversation: no system message$"):
        answerer.answers([([{"role": "system", "content": "Be kind."}, *QUESTION], None)])
    typed("/system Be kind.", "Hi", "More", "/system", "Hi")
    chat(answerer, None, Interrupts())
    assert capsys.readouterr().out.count("refuses this conversation: no system message\n") == 2


def test_a_line_that_is_no_utf8_is_told_and_the_next_one_read(monkeypatch, capsys):
    lines = [b"caf\xe9", "caf\udce9", b"Hi", None]  # the second as Python reads it where the locale is C

    def read(prompt):
        if (line := lines.pop(0)) is None:
            raise EOFError
        return line if isinstance(line, str) else line.decode()

    monkeypatch.setattr(builtins, "input", read)
    assert talk(Told()) == [["Hi"]]
    assert capsys.readouterr().out.count("not UTF-8") == 2


def test_draws_differ_and_a_seed_repeats_them(tiny_base):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)

    def answers(seed=None) -> list[str]:
        answerer = Answerer(model, tokenizer, [0], "cpu", 12, 1.0, seed)
        return [answerer.answer(QUESTION) for _ in range(3)]

    first = answers(seed=5)
    assert answers(seed=5) == first
    assert len({*first, *answers(seed=6), *answers(), *answers()}) == 12
