"""One row of any usual format as `messages`, and what is wrong with it."""

import json
import re

FORMATS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
}
"Each format with the columns a row must have; see docs/data.md for an example of each."

OPTIONAL_COLUMNS = {
    "messages": ("tools",),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input", "system", "history"),
    "prompt_completion": ("system",),
}
MEDIA_COLUMNS = ("images", "videos", "audios")
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "function_call": "function_call",
}
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


def detect_format(columns) -> str | None:
    """The first format all of whose columns are there."""
    return next((name for name, needed in FORMATS.items() if set(needed) <= set(columns)), None)


def rename_columns(row: dict, columns: dict[str, str]) -> dict:
    """`row` under the format's own column names; `columns` maps each to the name it has in the data."""
    if not columns:
        return row
    taken = set(columns.values())
    kept = {key: value for key, value in row.items() if key not in taken and key not in columns}
    return kept | {name: row[source] for name, source in columns.items() if source in row}


def to_conversation(row: dict, format: str, system_message: str | None = None) -> dict:
    """`{"messages": [...]}`, and `"tools"` as JSON text where the row has tools. Raises RowError."""
    for column in FORMATS[format]:
        if column not in row:
            raise RowError("missing_field", f"no '{column}'; the row has {', '.join(map(repr, row)) or 'nothing'}")
        if row[column] is None:
            raise RowError("null_content", f"'{column}' is null")
    for column in MEDIA_COLUMNS:
        if isinstance(row.get(column), list) and row[column]:
            raise RowError("wrong_type", f"only text can be trained on, '{column}' holds {len(row[column])}")
    messages = [Message(_message(turn, where), where) for where, turn in _CONVERTERS[format](row)]
    messages = [message for message in messages if message["role"] != "system" or message["content"].strip()]
    if system_message and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, Message({"role": "system", "content": system_message}, "system_message"))
    conversation = {"messages": messages}
    if tools := _tools_as_text(row.get("tools") or (_old_functions(row) if format == "messages" else None)):
        conversation["tools"] = tools
    return conversation


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
            raise RowError("already_rendered", f"{where}: already rendered with a template: {_quote(rendered.group())}")


def check_text(conversation: dict, control_tokens: re.Pattern) -> None:
    """Raise RowError for text that would become control tokens."""
    for where, text in _texts(conversation):
        if token := control_tokens.search(text):
            raise RowError("control_token", f"{where}: the text holds the control token {token.group()}")
        if surrogate := _SURROGATE.search(text):
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

    for message in conversation["messages"]:
        for key in ("content", *_NAMED_TEXTS):
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
    """Chat templates expect the arguments of tool calls as objects; stored rows have their JSON text."""
    return [
        message | {"tool_calls": list(map(_with_object, message["tool_calls"]))}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _with_object(call: dict) -> dict:
    function, arguments = call["function"], call["function"]["arguments"]
    return call | {"function": function | {"arguments": _json_value(arguments, "arguments")}}


def _from_messages(row):
    yield from _turns(row, "messages")


def _from_sharegpt(row):
    if row.get("system"):
        yield "system", {"role": "system", "content": row["system"]}
    yield from _turns(row, "conversations")


def _from_alpaca(row):
    if row.get("system"):
        yield "system", {"role": "system", "content": row["system"]}
    for number, pair in enumerate(_json_value(row.get("history"), "history") or ()):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("wrong_type", f"history[{number}]: expected [question, answer], found {_kind(pair)}")
        yield f"history[{number}][0]", {"role": "user", "content": pair[0]}
        yield f"history[{number}][1]", {"role": "assistant", "content": pair[1]}
    question = [row["instruction"], row.get("input")]
    for column, text in zip(("instruction", "input"), question, strict=True):
        if text is not None and not isinstance(text, str):
            raise RowError("wrong_type", f"'{column}': expected text, found {_kind(text)}")
    yield "instruction", {"role": "user", "content": "\n\n".join(text for text in question if text and text.strip())}
    yield "output", {"role": "assistant", "content": row["output"]}


def _from_prompt_completion(row):
    if row.get("system"):
        yield "system", {"role": "system", "content": row["system"]}
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row[column], list):
            yield from _turns(row, column)
        else:
            yield column, {"role": role, "content": row[column]}


_CONVERTERS = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
}
_NAMED_TEXTS = ("name", "tool_call_id", "reasoning_content")
_SURROGATE = re.compile("[\ud800-\udfff]")


def _turns(row: dict, column: str):
    turns = _json_value(row[column], column)
    if not isinstance(turns, list):
        raise RowError("wrong_type", f"'{column}': expected a list of turns, found {_kind(turns)}")
    for number, turn in enumerate(turns):
        yield f"{column}[{number}]", turn


def _message(turn, where: str) -> dict:
    """One turn as `role`, `content` and, where it has them, `tool_calls`, `tool_call_id`, `name`, reasoning."""
    if not isinstance(turn, dict):
        raise RowError("wrong_type", f"{where}: expected an object with 'role' and 'content', found {_kind(turn)}")
    role = _role(turn, where)
    if role == "function_call":
        turn = {"role": "assistant", "content": "", "tool_calls": _json_value(_content(turn, where, False), where)}
        turn["tool_calls"] = turn["tool_calls"] if isinstance(turn["tool_calls"], list) else [turn["tool_calls"]]
        role = "assistant"
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    for key in ("weight", "loss_weight"):
        if role == "assistant" and turn.get(key) == 0:
            raise RowError("untrained_turn", f"{where}: '{key}: 0' (an answer not to be trained on) is not supported")
    message = {"role": role, "content": _content(turn, where, optional=bool(calls))}
    if calls:
        message["tool_calls"] = [_tool_call(call, where) for call in _list(calls, where)]
    for key in ("name", "tool_call_id") if role == "tool" else ("reasoning_content",):
        if isinstance(turn.get(key), str):
            message[key] = turn[key]
    return message


def _role(turn: dict, where: str) -> str:
    given = turn.get("role", turn.get("from"))
    if given is None:
        raise RowError("missing_field", f"{where}: no 'role'")
    if not isinstance(given, str) or given not in ROLES:
        allowed = "system, user, assistant, tool"
        raise RowError("unknown_role", f"{where}: unknown role {_quote(str(given))}; allowed: {allowed}")
    return ROLES[given]


def _content(turn: dict, where: str, optional: bool) -> str:
    key = next((key for key in ("content", "value") if key in turn), None)
    if key is None and not optional:
        raise RowError("missing_field", f"{where}: no 'content'")
    content = turn.get(key)
    if content is None:
        if optional:
            return ""
        raise RowError("null_content", f"{where}: '{key}' is null")
    if isinstance(content, list):
        return "".join(_text_part(part, where) for part in content)
    if not isinstance(content, str):
        raise RowError("wrong_type", f"{where}: '{key}': expected text, found {_kind(content)}")
    return content


def _text_part(part, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text":
        text = part.get("text", part.get("value"))
        if isinstance(text, str):
            return text
        raise RowError("wrong_type", f"{where}: a part of type 'text' has no 'text'")
    kind = part.get("type") if isinstance(part, dict) else _kind(part)
    raise RowError("wrong_type", f"{where}: only text can be trained on, found a part of type {_quote(str(kind))}")


def _tool_call(call, where: str) -> dict:
    """OpenAI's shape, the arguments as JSON text: columns of a table cannot hold objects that differ by row."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("wrong_type", f"{where}: a tool call needs a function with a 'name'")
    given = next((function[key] for key in ("arguments", "parameters") if function.get(key) not in (None, "")), {})
    arguments = _json_value(given, f"{where}: arguments of '{function['name']}'")
    if not isinstance(arguments, dict):
        raise RowError("wrong_type", f"{where}: arguments of '{function['name']}' are not a JSON object")
    text = _as_json(arguments, f"{where}: arguments of '{function['name']}'")
    kept = {"type": "function", "function": {"name": function["name"], "arguments": text}}
    return {"id": call["id"], **kept} if isinstance(call.get("id"), str) else kept


def _tools_as_text(tools) -> str | None:
    tools = _json_value(tools, "tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("wrong_type", f"'tools': expected a list of objects, found {_kind(tools)}")
    return _as_json(tools, "'tools'")


def _as_json(value, where: str) -> str:
    """As a template will write it, without escapes that hide a token."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise RowError(
            "wrong_type", f"{where}: a number is infinite or not a number, which JSON has no word for"
        ) from None


def _old_functions(row: dict) -> list | None:
    """OpenAI's `functions`, as tools were called before; a column of that name with other contents is ignored."""
    try:
        functions = _json_value(row.get("functions"), "functions")
    except RowError:
        return None
    if isinstance(functions, list) and all(isinstance(function, dict) for function in functions):
        return [{"type": "function", "function": function} for function in functions]
    return None


def _json_value(value, where: str):
    """Columns of CSV files, and often of Parquet files, hold lists and objects as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        raise RowError("wrong_type", f"{where}: expected a list or its JSON text, found {_quote(value)}") from None


def _list(value, where: str) -> list:
    if not isinstance(value, list):
        raise RowError("wrong_type", f"{where}: 'tool_calls': expected a list, found {_kind(value)}")
    return value


def _may_follow(previous: str | None, message: dict) -> tuple[str, ...]:
    if previous == "assistant":
        return ("tool",) if message.get("tool_calls") else ("user",)
    return {None: ("system", "user"), "system": ("user",), "user": ("assistant",), "tool": ("tool", "assistant")}[
        previous
    ]


def _texts(conversation: dict):
    """(place in the row, text) of all that a template may write."""
    for message in conversation["messages"]:
        yield message.where, message["content"]
        for key in _NAMED_TEXTS:
            if key in message:
                yield f"{message.where}.{key}", message[key]
        for call in message.get("tool_calls", ()):
            texts = call.get("id", ""), call["function"]["name"], call["function"]["arguments"]
            yield f"{message.where}.tool_calls", "\n".join(texts)
    if "tools" in conversation:
        yield "tools", conversation["tools"]


def _kind(value) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def _quote(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")


def _name(role: str | None) -> str:
    return f"'{role}'" if role else "the start"
