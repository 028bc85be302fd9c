"""A conversation as fitune keeps it: what is wrong with its turns and texts, and how a template takes it."""

import json
import re

LLAMA3_CONTROL_TOKENS = re.compile(
    r"<\|(?:begin_of_text|end_of_text|start_header_id|end_header_id|eot_id|eom_id|python_tag|finetune_right_pad_id"
    r"|reserved_special_token_\d+)\|>"
)
RENDERED = re.compile(
    r"<\|start_header_id\|>\w+<\|end_header_id\|>"
    r"|<\|im_start\|>(?:system|user|assistant)\b"
    r"|<start_of_turn>(?:user|model)\b"
    r"|<\|(?:system|user|assistant)\|>"
    r"|\[INST\].*\[/INST\]"
    r"|### Instruction:.*### Response:"
    r"|(?:^|\n\n)Human: .*\n\nAssistant:",
    re.DOTALL,
)

_MAY_BE_RENDERED = re.compile(
    r"<\|(?:start_header_id|im_start|system|user|assistant)|<start_of_turn|\[/INST\]|### Response:|\nAssistant:"
)
"One of these is in every text that RENDERED finds, and a search for it is fast."


REASONING = ("reasoning_content", "thinking", "reasoning")
"The keys that tools give an answer's thinking. It is stored under the first; templates get it under each of them."


class RowError(Exception):
    """Why a row cannot be used: `reason` is the name counted in the report, the message says what was found."""

    def __init__(self, reason: str, message: str):
        super().__init__(reason, message)
        self.reason, self.message = reason, message

    def __str__(self):
        return self.message


class Message(dict):
    """One turn, with the place in its row where it was found: `messages[2]`, `output`."""

    def __init__(self, message: dict, where: str):
        super().__init__(message)
        self.where = where


def check_turns(messages: list[Message]) -> None:
    """Raise RowError unless the turns are: an optional system message, then user and assistant in turn."""
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("no_assistant", "no turn of the assistant: nothing to learn from")
    previous = None
    for number, message in enumerate(messages):
        role = message["role"]
        if not message["content"].strip() and not message.get("tool_calls"):
            reason = "empty_answer" if role == "assistant" else "empty_turn"
            raise RowError(reason, f"{message.where}: the {role}'s content is empty")
        if role not in _may_follow(previous, messages[number - 1] if number else {}):
            raise RowError("roles_out_of_order", f"{message.where}: '{role}' after {_name(previous)}")
        previous = role
    if previous != "assistant":
        raise RowError("roles_out_of_order", f"the last turn is the {previous}'s, not the assistant's")


def check_not_rendered(conversation: dict) -> None:
    """Raise RowError for text that a template has already been applied to."""
    for where, text in _texts(conversation):
        if _MAY_BE_RENDERED.search(text) and (rendered := RENDERED.search(text)):
            raise RowError("already_rendered", f"{where}: already rendered with a template: {quote(rendered.group())}")


def check_text(conversation: dict, control_tokens: re.Pattern) -> None:
    """Raise RowError for text that would become control tokens."""
    for where, text in _texts(conversation):
        if token := control_tokens.search(text):
            raise RowError("control_token", f"{where}: the text holds the control token {token.group()}")
        if not text.isascii() and (surrogate := _SURROGATE.search(text)):
            raise RowError("not_utf8", f"{where}: lone surrogate {ascii(surrogate.group())[1:-1]} is not a character")


def escape_control_tokens(conversation: dict, control_tokens: re.Pattern) -> int:
    """Put a space after the first character of each control token in the texts, in place; returns how many."""
    count = 0

    def escaped(text: str) -> str:
        nonlocal count
        while control_tokens.search(text):
            text, found = control_tokens.subn(lambda match: match.group()[0] + " " + match.group()[1:], text)
            count += found
        return text

    if "text" in conversation:
        conversation["text"] = escaped(conversation["text"])
    for message in conversation.get("messages", ()):
        for key in ("content", *NAMED_TEXTS):
            if key in message:
                message[key] = escaped(message[key])
        for call in message.get("tool_calls", ()):
            for owner, key in ((call, "id"), (call["function"], "name"), (call["function"], "arguments")):
                if key in owner:
                    owner[key] = escaped(owner[key])
    if "tools" in conversation:
        conversation["tools"] = escaped(conversation["tools"])
    return count


def for_template(conversation: dict) -> tuple[list[dict], list | None]:
    """Messages and tools as a chat template takes them."""
    tools = conversation.get("tools")
    return arguments_as_objects(conversation["messages"]), json.loads(tools) if tools else None


def arguments_as_objects(messages: list[dict]) -> list[dict]:
    """Chat templates expect the arguments of tool calls as objects; stored rows have their JSON text.

    Keys that a table filled in with null are left out: templates ask whether they are there. So is `train`, which is
    not theirs.
    """
    return [
        _as_templates_take(message) | ({"tool_calls": list(map(_with_object, calls))} if calls else {})
        for message in messages
        for calls in [message.get("tool_calls")]
    ]


def _with_object(call: dict) -> dict:
    function, arguments = call["function"], call["function"]["arguments"]
    return _without_nulls(call) | {
        "function": _without_nulls(function) | {"arguments": json_value(arguments, "arguments")}
    }


def _as_templates_take(message: dict) -> dict:
    kept = _without_nulls(message)
    kept.pop("train", None)
    thinking = kept.get(REASONING[0])
    return kept if thinking is None else kept | dict.fromkeys(REASONING, thinking)


def _without_nulls(values: dict) -> dict:
    return {key: value for key, value in values.items() if value is not None or key == "content"}


NAMED_TEXTS = ("name", "tool_call_id", REASONING[0])
_SURROGATE = re.compile("[\ud800-\udfff]")


_CALL_IN_TEXT = re.compile(r"<tool_call|<function|\[TOOL_CALLS\]|<\|python_tag\|>|\"name\"\s*:")
"How models write a call; some data have it in the text of the answer."


def _may_follow(previous: str | None, message: dict) -> tuple[str, ...]:
    if previous == "assistant":
        if message.get("tool_calls"):
            return ("tool",)
        return ("user", "tool") if _CALL_IN_TEXT.search(message["content"]) else ("user",)
    return {None: ("system", "user"), "system": ("user",), "user": ("assistant",), "tool": ("tool", "assistant")}[
        previous
    ]


def _texts(conversation: dict):
    """(place in the row, text) of all that a template may write."""
    if "text" in conversation:
        yield "text", conversation["text"]
    for message in conversation.get("messages", ()):
        yield message.where, message["content"]
        for key in NAMED_TEXTS:
            if key in message:
                yield f"{message.where}.{key}", message[key]
        for call in message.get("tool_calls", ()):
            texts = call.get("id", ""), call["function"]["name"], call["function"]["arguments"]
            yield f"{message.where}.tool_calls", "\n".join(texts)
    if "tools" in conversation:
        yield "tools", conversation["tools"]


def json_value(value, where: str):
    """Columns of CSV files, and often of Parquet files, hold lists and objects as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        raise RowError("wrong_type", f"{where}: expected a list or its JSON text, found {quote(value)}") from None


def kind_of(value) -> str:
    """In words, of a value that stands where it should not."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def quote(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")


def _name(role: str | None) -> str:
    return f"'{role}'" if role else "the start"
