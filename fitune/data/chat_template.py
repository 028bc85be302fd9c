"""Which Jinja template turns a conversation into text, and which tokens it pads with and stops at."""

import functools
import hashlib
import json
import re
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fitune.data.conversations import arguments_as_objects
from fitune.data.file_formats import first_line
from fitune.errors import UsageError

TEMPLATE_FOLDER = Path(__file__).parent / "chat_templates"
SHIPPED = ("llama3", "plain")
PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|reserved_special_token_250|>", "<|reserved_special_token_0|>")
LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
PROBE = [
    {"role": "user", "content": "First question?"},
    {"role": "assistant", "content": "First answer."},
    {"role": "user", "content": "Second question?"},
    {"role": "assistant", "content": "Second answer."},
]


def read_tokenizer(folder: Path | str):
    """The transformers tokenizer of a model folder; code that lies beside it is not run. Raises UsageError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"tokenizer {folder}: cannot be loaded: {first_line(error)}") from None


def apply_chat_template_choice(tokenizer, choice: str) -> None:
    """Give a transformers tokenizer the training template named by `choice` and a pad token.

    `choice` is `llama3`, `plain`, `tokenizer` (the one the tokenizer came with) or the path of a .jinja file. Raises
    UsageError if the template does not mark what the assistant says, or the vocabulary lacks a token it needs.
    """
    template = training_template(choice, tokenizer.chat_template)
    _refuse_missing_tokens(tokenizer, choice)
    check_marks_answers(template, tokenizer.special_tokens_map, choice)
    _refuse_misplaced_marks(tokenizer, template, choice)
    pad_token = _pad_token(tokenizer)
    tokenizer.chat_template = template
    tokenizer.pad_token = pad_token
    tokenizer.apply_chat_template = functools.partial(_apply_to_stored_rows, tokenizer)


def _apply_to_stored_rows(tokenizer, conversation, *args, **kwargs):
    """Has the tokenizer take prepared rows as they are, in TRL's hands too: see `arguments_as_objects`.

    Not by a column of datasets' `Json`: its parser changes numbers, 3.3505 to 3.3504999999999998.
    """
    is_one = not conversation or isinstance(conversation[0], dict)
    parsed = arguments_as_objects(conversation) if is_one else list(map(arguments_as_objects, conversation))
    return type(tokenizer).apply_chat_template(tokenizer, parsed, *args, **kwargs)


def end_of_turn_ids(tokenizer, choice: str) -> list[int]:
    """Token ids at which generation stops: the token that ends the assistant's turn, then end-of-text."""
    if choice == "llama3":
        names = ["<|eot_id|>", tokenizer.eos_token]
    elif choice == "plain":
        names = [tokenizer.eos_token]
    else:
        names = [_end_of_turn_text(tokenizer, choice), tokenizer.eos_token]
    ids = (tokenizer.convert_tokens_to_ids(name) for name in names if name)
    return list(dict.fromkeys(token_id for token_id in ids if token_id is not None))


def template_hash(tokenizer) -> str:
    """SHA-256 of the tokenizer's chat template."""
    return sha256(tokenizer.chat_template or "")


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def tokenizer_hash(tokenizer) -> str:
    """SHA-256 of what turns text into ids; padding and truncation, set anew by every caller, are left out."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    description.pop("padding", None)
    description.pop("truncation", None)
    return sha256(json.dumps(description, sort_keys=True))


def control_tokens_of_template(tokenizer) -> list[str]:
    """Added tokens that the tokenizer's chat template writes, in the order of their first use.

    A base model may never have trained their embeddings.
    """
    text, _ = ChatRenderer(tokenizer.chat_template, tokenizer.special_tokens_map).render(PROBE)
    used = [name for name in tokenizer.get_added_vocab() if name in text]
    return sorted(used, key=text.index)


def training_template(choice: str, tokenizers_own: str | None = None) -> str:
    """The template's text. Raises UsageError for an unknown choice, a missing file or a tokenizer without one."""
    if choice in SHIPPED:
        return (TEMPLATE_FOLDER / f"{choice}.jinja").read_text(encoding="utf-8")
    if choice == "tokenizer":
        if not isinstance(tokenizers_own, str):
            raise UsageError("chat_template: tokenizer: this tokenizer has no chat template; use llama3 or plain")
        return tokenizers_own
    if not choice.endswith(".jinja"):
        raise UsageError(f"chat_template: {choice}: allowed are llama3, plain, tokenizer or the path of a .jinja file")
    try:
        return Path(choice).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"chat_template: {choice}: cannot be read: {error}") from None


def check_marks_answers(template: str, special_tokens: dict[str, str], choice: str) -> None:
    """Raise UsageError unless every answer and its end of turn, and nothing else, lies in a generation block."""
    advice = (
        "put {% generation %} before what the assistant says and {% endgeneration %} after its end-of-turn token, "
        "or use chat_template: llama3"
    )
    try:
        text, spans = ChatRenderer(template, special_tokens).render(PROBE)
    except jinja2.TemplateError as error:
        raise UsageError(f"chat_template: {choice}: not a working template: {error}") from None
    marked = [text[start:end] for start, end in spans]
    answers = [message["content"] for message in PROBE if message["role"] == "assistant"]
    if not marked:
        raise UsageError(f"chat_template: {choice}: it does not mark the assistant's answers; {advice}")
    if len(marked) != len(answers) or any(answer not in span for answer, span in zip(answers, marked, strict=True)):
        raise UsageError(f"chat_template: {choice}: it marks {marked!r} instead of the two answers; {advice}")
    others = [message["content"] for message in PROBE if message["role"] != "assistant"]
    if swallowed := next((text for text in others for span in marked if text in span), None):
        raise UsageError(f"chat_template: {choice}: it marks {swallowed!r}, which no assistant says; {advice}")
    if any(span.rstrip().endswith(answer) for answer, span in zip(answers, marked, strict=True)):
        raise UsageError(f"chat_template: {choice}: it leaves the end of the turn out of the answer; {advice}")


class ChatRenderer:
    """Renders conversations as transformers' `apply_chat_template(tokenize=False)` does, and says where answers lie.

    It does without importing transformers, so `prepare` starts fast and its processes stay small.
    """

    def __init__(self, template: str, special_tokens: dict[str, str]):
        self._template = _environment().from_string(template)
        self._special_tokens = dict(special_tokens)

    def render(self, messages, tools=None, add_generation_prompt=False) -> tuple[str, list[tuple[int, int]]]:
        """The text, and `(start, end)` character positions of what the assistant generates.

        Raises jinja2.TemplateError where the template refuses the conversation.
        """
        variables = self._special_tokens | {"messages": messages, "tools": tools, "documents": None}
        environment = self._template.environment
        with environment.answer_marks.collect() as marks:
            for block in self._template.generate(**variables, add_generation_prompt=add_generation_prompt):
                marks.blocks.append(block)
                marks.length += len(block)
            return "".join(marks.blocks), marks.spans


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


def _refuse_missing_tokens(tokenizer, choice: str) -> None:
    """A control token that the vocabulary lacks would be spelled out as ordinary text in every row."""
    vocabulary = tokenizer.get_vocab()
    needed = [*(LLAMA3_TOKENS if choice == "llama3" else ())]
    missing = [token for token in needed if token not in vocabulary]
    if choice in SHIPPED:
        missing += [name for name in ("bos_token", "eos_token") if getattr(tokenizer, name) is None]
    if missing:
        other = "plain or tokenizer" if choice == "llama3" else "tokenizer, or a .jinja file"
        raise UsageError(f"chat_template: {choice}: this tokenizer has no {', '.join(missing)}; use {other}")


def _refuse_misplaced_marks(tokenizer, template: str, choice: str) -> None:
    """Where offsets leave out a token's leading space, transformers finds no token there and masks the whole row."""
    encoded = tokenizer.apply_chat_template(
        PROBE, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    trained = [token for token, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    text, spans = ChatRenderer(template, tokenizer.special_tokens_map).render(PROBE)
    marked = "".join(text[start:end] for start, end in spans)
    found = tokenizer.decode(trained, clean_up_tokenization_spaces=False)
    if found != marked:
        raise UsageError(
            f"chat_template: {choice}: with this tokenizer {found!r} would be trained instead of {marked!r}: an answer "
            "must begin and end where a token does (ByteLevel post-processors need trim_offsets: false)"
        )


def _pad_token(tokenizer) -> str:
    """A token that means nothing else, where there is one; labels and mask, not tokens, say what is trained."""
    taken = {tokenizer.eos_token, tokenizer.bos_token, "<|eot_id|>"}
    vocabulary = tokenizer.get_vocab()
    for token in (*PAD_TOKENS, tokenizer.pad_token):
        if token is not None and token in vocabulary and token not in taken:
            return token
    if tokenizer.eos_token is not None:
        return tokenizer.eos_token
    raise UsageError(
        f"this tokenizer has no token to pad with; expected one of {', '.join(PAD_TOKENS)}, or a pad_token or an "
        f"eos_token in tokenizer_config.json"
    )


def _end_of_turn_text(tokenizer, choice: str) -> str | None:
    """The first added token after an answer, as the template writes it."""
    template = training_template(choice, tokenizer.chat_template)
    text, spans = ChatRenderer(template, tokenizer.special_tokens_map).render(PROBE)
    after_answer = text[spans[-1][0] : spans[-1][1]].split(PROBE[-1]["content"])[-1]
    names = "|".join(re.escape(name) for name in sorted(tokenizer.get_added_vocab(), key=len, reverse=True))
    found = re.search(names, after_answer) if names else None
    return found.group() if found else None
