"""A conversation on the terminal: answers appear as they are written, Ctrl-C ends one, commands begin with a slash."""

import contextlib
import json
import signal
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import StoppingCriteria, TextStreamer

from fitune.columns import printable
from fitune.errors import UsageError
from fitune.training.distributed import is_main_process, wait_for_rank_0

HELP = (
    "/exit ends the chat, /reset forgets what was said, /system TEXT sets the system message, /save FILE writes it down"
)
STOPPED = 130
"Exit code of what Ctrl-C ended."


class Interrupts:
    """What Ctrl-C means from now on. While the model is loaded, the end; then it depends on who is at work.

    Every rank gets the signal, at another moment each. So they only note it, and agree after each token; the main one
    alone reads the terminal.
    """

    def __init__(self):
        self.state, self.noted = "loading", 0
        self.lines = 0
        self._before = signal.signal(signal.SIGINT, self._note)

    def restore(self) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, number, frame) -> None:
        self.noted += 1
        if self.state == "loading":
            raise SystemExit(STOPPED)
        if self.state == "reading":
            raise KeyboardInterrupt

    def of_any_rank(self) -> int:
        """How often, at most. Call on all ranks."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.noted
        noted = torch.tensor([self.noted])
        dist.all_reduce(noted, dist.ReduceOp.MAX)
        return int(noted)


class _UntilInterrupted(StoppingCriteria):
    def __init__(self, interrupts: Interrupts):
        self.interrupts = interrupts

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.interrupts.of_any_rank() > 0, device=input_ids.device)


@dataclass
class Conversation:
    """What was said, and the commands that change it."""

    system_message: str | None
    messages: list[dict] = field(default_factory=list)

    def __post_init__(self):
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system_message}] if self.system_message else []

    def command(self, line: str) -> str:
        """Carries out a line that begins with a slash; what to tell the user."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/reset":
            self.reset()
            return "forgotten"
        if name == "/system":
            self.system_message = rest or None
            self.reset()
            return f"system message {'set' if rest else 'removed'}; the conversation begins anew"
        if name == "/save" and rest:
            return self.save(Path(rest).expanduser()) if is_main_process() else ""
        return HELP

    def save(self, file: Path) -> str:
        """As a row that `prepare` reads; nothing is overwritten."""
        if all(message["role"] == "system" for message in self.messages):
            return f"{file}: not saved: nothing was said yet"
        try:
            with file.open("x", encoding="utf-8") as stream:
                stream.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            return f"{file}: not saved: {error.strerror}"
        return f"saved: {file}"


class Shown(TextStreamer):
    """An answer on the terminal while it is written."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(printable(text), stream_end)


def chat(answerer, system_message: str | None, interrupts: Interrupts) -> None:
    """Until /exit, the end of input, or Ctrl-C twice in a row. Call on all ranks, with a `generate.Answerer`."""
    conversation = Conversation(system_message)
    streamer = Shown(answerer.tokenizer, skip_prompt=True, skip_special_tokens=True) if is_main_process() else None
    _say(HELP)
    try:
        while (line := _next_line(interrupts)) not in (None, "/exit"):
            if line.startswith("/"):
                _say(conversation.command(line))
            elif line:
                _answer(answerer, conversation, line, streamer, interrupts)
    finally:
        interrupts.restore()


def _answer(answerer, conversation: Conversation, line: str, streamer, interrupts: Interrupts) -> None:
    interrupts.state = "answering"
    asked = [*conversation.messages, {"role": "user", "content": line}]
    try:
        said = answerer.answer(asked, streamer=streamer, stopping=[_UntilInterrupted(interrupts)])
    except UsageError as error:  # the chat template refuses it, on all ranks
        _say(str(error))
    else:
        conversation.messages = [*asked, {"role": "assistant", "content": said}]


def _next_line(interrupts: Interrupts) -> str | None:
    """What was typed, on all ranks; None at the end. A Ctrl-C that ended the answer before counts as the first."""
    line = [None]
    if is_main_process():
        with contextlib.suppress(EOFError):
            line = [_read(interrupts)]
    interrupts.state, interrupts.lines = "waiting", interrupts.lines + 1
    wait_for_rank_0(f"line {interrupts.lines} of the chat")  # which may be typed after an hour
    if dist.is_initialized():
        dist.broadcast_object_list(line)
    interrupts.noted = 0
    return line[0]


def _read(interrupts: Interrupts) -> str | None:
    while interrupts.noted < 2:
        if interrupts.noted:
            _say("\n(stopped; Ctrl-C again ends the chat)")
        try:
            interrupts.state = "reading"
            line = input("you> ").strip()
            line.encode()  # in some locales Python reads any byte
            return line
        except KeyboardInterrupt:
            continue
        except UnicodeError:
            _say("this line is not UTF-8, as the terminal should write it")
        finally:
            interrupts.state = "waiting"
    print()
    return None


def _say(text: str) -> None:
    if text and is_main_process():
        print(text, flush=True)
