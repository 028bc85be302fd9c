"""A conversation as a chat template writes it, and where in that text the assistant's answers lie.

A template says so itself by `{% generation %} ... {% endgeneration %}`. Most models' own templates don't. Then an
answer is what its turn adds to the prompt that the template writes for it: the conversation is rendered up to each
answer, with and without it. That is how the model will be asked later: what is trained is what it will have to write.
"""

import functools
import itertools
import json
import re
from contextlib import contextmanager
from datetime import datetime

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fitune.data.conversations import quote

Span = tuple[int, int]
"(start, end) in characters"

_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_THINKING = re.compile(r"</?think>")


class AnswerNotFound(jinja2.TemplateError):
    """The template does not let an answer be told from the rest of the text; the message says where and why."""


class ChatRenderer:
    """Renders conversations as transformers' `apply_chat_template(tokenize=False)` does, and says where answers lie.

    It does without importing transformers, so `prepare` starts fast and its processes stay small.
    """

    def __init__(self, template: str, special_tokens: dict[str, str]):
        self._template = _compiled(template)
        self._special_tokens = dict(special_tokens)
        self.marks_answers = bool(_MARK.search(template))
        "Whether the template itself says where answers lie."

    def render(self, messages, tools=None, wanted: list[bool] | None = None) -> tuple[str, list[Span]]:
        """The text, and where in it lies what the assistant generates, answer by answer.

        `wanted` says for each answer whether its place is asked for; all are by default. Raises jinja2.TemplateError
        where the template refuses the conversation, AnswerNotFound, which is one, where a wanted answer cannot be told
        from the rest.
        """
        text, marked = self._render(messages, tools, add_generation_prompt=False)
        if not self.marks_answers:
            return text, self._found_by_rendering(text, messages, tools, wanted)
        answers = sum(message["role"] == "assistant" for message in messages)
        is_whole = wanted is None or all(wanted)
        if len(marked) < answers or (len(marked) > answers and not is_whole):
            raise AnswerNotFound(f"it marks {len(marked)} of {answers} answers")
        return text, marked if is_whole else list(itertools.compress(marked, wanted))

    def text(self, messages, tools=None, add_generation_prompt=False) -> str:
        """The text alone. Raises jinja2.TemplateError where the template refuses the conversation."""
        return self._render(messages, tools, add_generation_prompt)[0]

    def document(self, text: str) -> tuple[str, list[Span]]:
        """A text without turns between the tokens that begin and end one, and where it lies with its end."""
        begin, end = (self._special_tokens.get(name) or "" for name in ("bos_token", "eos_token"))
        return begin + text + end, [(len(begin), len(begin + text + end))]

    def _render(self, messages, tools, add_generation_prompt) -> tuple[str, list[Span]]:
        variables = self._special_tokens | {"messages": messages, "tools": tools, "documents": None}
        environment = self._template.environment
        with environment.answer_marks.collect() as marks:
            for block in self._template.generate(**variables, add_generation_prompt=add_generation_prompt):
                marks.blocks.append(block)
                marks.length += len(block)
            return "".join(marks.blocks), marks.spans

    def _found_by_rendering(self, text: str, messages, tools, wanted: list[bool] | None) -> list[Span]:
        """Where the answers are: after the prompt that each was asked with, up to where its turn ends."""
        spans, last = [], len(messages) - 1
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        for number in answers if wanted is None else itertools.compress(answers, wanted):
            message = messages[number]
            until = text if number == last else self.text(messages[: number + 1], tools)
            if not text.startswith(until):
                raise AnswerNotFound(
                    f"it writes messages[{number}] otherwise once other turns follow: {_difference(until, text)}; "
                    f"data.train_on: last trains the last answer alone, which is written as it will be asked for"
                )
            prompt = self.text(messages[:number], tools, add_generation_prompt=True)
            if not until.startswith(prompt):
                raise AnswerNotFound(
                    f"it asks for messages[{number}] with another text than it writes before it: "
                    f"{_difference(prompt, until)}"
                )
            _refuse_cut_answer(number, message["content"], until[len(prompt) :])
            spans.append((len(prompt), len(until)))
        return spans


def _refuse_cut_answer(number: int, content: str, written: str) -> None:
    """White space at the edges may be changed, and the tags around thinking; words may not get lost."""
    for part in _THINKING.split(content or ""):
        if part.strip() not in written:
            raise AnswerNotFound(f"it leaves out what messages[{number}] says: {quote(part.strip())}")


def _difference(one: str, other: str) -> str:
    """Where two texts part, and how each goes on."""
    place = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"at character {place} {quote(one[place : place + 60])}, then {quote(other[place : place + 60])}"


class _AnswerMarks(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: notes where in the text the block's output lies."""

    tags = frozenset({"generation"})

    def __init__(self, environment):
        super().__init__(environment)
        environment.extend(answer_marks=self)

    @contextmanager
    def collect(self):
        self.blocks, self.spans, self.length = [], [], 0
        yield self

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller) -> str:
        text = caller()
        self.spans.append((self.length, self.length + len(text)))
        return text


@functools.lru_cache
def _compiled(template: str) -> jinja2.Template:
    """Made once a process: compiling takes longer than rendering many rows."""
    compiled = _environment().from_string(template)
    compiled.globals = dict(compiled.globals)  # each text has a copy of them, which takes long of Jinja's ChainMap
    return compiled


def _environment() -> ImmutableSandboxedEnvironment:
    """The filters and functions that transformers offers to chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_AnswerMarks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message):
    raise jinja2.TemplateError(message)
