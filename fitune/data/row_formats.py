"""One row of any usual format as a conversation."""

import json
from collections.abc import Collection

from fitune.data.content_parts import unpacked
from fitune.data.conversations import REASONING, Message, RowError, json_value, quote
from fitune.data.reasoning import reasoning_of
from fitune.data.training_flags import is_trained

FORMATS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"Each format with the columns a row must have; see docs/data.md for an example of each."

OPTIONAL_COLUMNS = {
    "messages": ("tools",),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input", "system", "history"),
    "prompt_completion": ("system",),
    "text": (),
}
READ_COLUMNS = {name: {*FORMATS[name], *OPTIONAL_COLUMNS[name]} for name in FORMATS}
"Of each format all columns that are read."
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


def detect_format(row: dict) -> str | None:
    """The first format all of whose columns are there; before it, one that has something in all of them."""
    there = [name for name, needed in FORMATS.items() if row.keys() >= set(needed)]
    return next((name for name in there if _is_filled(row, name)), next(iter(there), None))


def format_of_row(row: dict, format: str) -> str:
    """Of a row in a file of `format`: another one where that one's columns are null and the other's are filled.

    Tables that were put together have the columns of both.
    """
    if any(row.get(column, "") is not None for column in FORMATS[format]):
        return format
    return next((name for name in FORMATS if _is_filled(row, name)), format)


def _is_filled(row: dict, format: str) -> bool:
    return all(row.get(column) is not None for column in FORMATS[format])


def rename_columns(row: dict, columns: dict[str, str]) -> dict:
    """`row` under the format's own column names; `columns` maps each to the name it has in the data."""
    if not columns:
        return row
    taken = set(columns.values())
    kept = {key: value for key, value in row.items() if key not in taken and key not in columns}
    return kept | {name: row[source] for name, source in columns.items() if source in row}


def to_conversation(
    row: dict, format: str, system_message: str | None = None, ignored_keys: Collection[str] = ()
) -> dict:
    """`{"messages": [...]}`, and `"tools"` as JSON text where the row has tools; or `{"text": ...}`. Raises RowError.

    Keys of turns that are in `ignored_keys` are not looked at. An answer that is not to be trained has `train: False`.
    """
    for column in FORMATS[format]:
        if column not in row:
            raise RowError("missing_field", f"no '{column}'; the row has {', '.join(map(repr, row)) or 'nothing'}")
        if row[column] is None:
            raise RowError("null_content", f"'{column}' is null")
    for column in MEDIA_COLUMNS:
        if isinstance(row.get(column), list) and row[column]:
            raise RowError("wrong_type", f"only text can be trained on, '{column}' holds {len(row[column])}")
    if format == "text":
        return {"text": _document(row["text"])}
    messages = [Message(_message(turn, where, ignored_keys), where) for where, turn in _CONVERTERS[format](row)]
    messages = [message for message in messages if message["role"] != "system" or message["content"].strip()]
    if system_message and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, Message({"role": "system", "content": system_message}, "system_message"))
    conversation = {"messages": messages}
    if tools := _tools_as_text(row.get("tools") or (_old_functions(row) if format == "messages" else None)):
        conversation["tools"] = tools
    return conversation


def _document(text) -> str:
    if not isinstance(text, str):
        raise RowError("wrong_type", f"'text': expected text, found {_kind(text)}")
    if not text.strip():
        raise RowError("empty_text", "'text' is empty")
    return text


def _from_messages(row):
    yield from _turns(row, "messages")


def _from_sharegpt(row):
    if row.get("system"):
        yield "system", {"role": "system", "content": row["system"]}
    yield from _turns(row, "conversations")


def _from_alpaca(row):
    if row.get("system"):
        yield "system", {"role": "system", "content": row["system"]}
    for number, pair in enumerate(json_value(row.get("history"), "history") or ()):
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
            for where, turn in _turns(row, column):
                yield where, turn | {"train": False} if _is_answer_in_prompt(column, turn) else turn
        else:
            yield column, {"role": role, "content": row[column]}


_CONVERTERS = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
}


def _is_answer_in_prompt(column: str, turn) -> bool:
    """Only the completion is trained."""
    if column != "prompt" or not isinstance(turn, dict):
        return False
    return ROLES.get(str(turn.get("role", turn.get("from")))) in ("assistant", "function_call")


def _turns(row: dict, column: str):
    turns = json_value(row[column], column)
    if not isinstance(turns, list):
        raise RowError("wrong_type", f"'{column}': expected a list of turns, found {_kind(turns)}")
    for number, turn in enumerate(turns):
        yield f"{column}[{number}]", turn


def _message(turn, where: str, ignored_keys: Collection[str]) -> dict:
    """One turn as `role`, `content` and, where it has them, `tool_calls`, `tool_call_id`, `name`, thinking, `train`."""
    if not isinstance(turn, dict):
        raise RowError("wrong_type", f"{where}: expected an object with 'role' and 'content', found {_kind(turn)}")
    if ignored_keys:
        turn = {key: value for key, value in turn.items() if key not in ignored_keys}
    role = _role(turn, where)
    is_answer = role in ("assistant", "function_call")
    turn = unpacked(turn, where, is_answer=is_answer)
    trained = is_trained(turn, "assistant" if is_answer else role, where)
    thinking = reasoning_of(turn, where) if is_answer else None
    if role == "function_call":
        turn = {"role": "assistant", "content": "", "tool_calls": json_value(_content(turn, where, False), where)}
        turn["tool_calls"] = turn["tool_calls"] if isinstance(turn["tool_calls"], list) else [turn["tool_calls"]]
        role = "assistant"
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    message = {"role": role, "content": _content(turn, where, optional=bool(calls))}
    if calls:
        message["tool_calls"] = [_tool_call(call, where) for call in _list(calls, where)]
    for key in ("name", "tool_call_id") if role == "tool" else ():
        if isinstance(turn.get(key), str):
            message[key] = turn[key]
    if thinking is not None:
        message[REASONING[0]] = thinking
    if is_answer and not trained:
        message["train"] = False
    return message


def _role(turn: dict, where: str) -> str:
    given = turn.get("role", turn.get("from"))
    if given is None:
        raise RowError("missing_field", f"{where}: no 'role'")
    if not isinstance(given, str) or given not in ROLES:
        allowed = "system, user, assistant, tool"
        raise RowError("unknown_role", f"{where}: unknown role {quote(str(given))}; allowed: {allowed}")
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
    if not isinstance(content, str):
        raise RowError("wrong_type", f"{where}: '{key}': expected text, found {_kind(content)}")
    return content


def _tool_call(call, where: str) -> dict:
    """OpenAI's shape, the arguments as JSON text: columns of a table cannot hold objects that differ by row."""
    call = json_value(call, where)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("wrong_type", f"{where}: a tool call needs a function with a 'name'")
    given = next((function[key] for key in ("arguments", "parameters") if function.get(key) not in (None, "")), {})
    arguments = json_value(given, f"{where}: arguments of '{function['name']}'")
    if not isinstance(arguments, dict):
        raise RowError("wrong_type", f"{where}: arguments of '{function['name']}' are not a JSON object")
    text = _as_json(arguments, f"{where}: arguments of '{function['name']}'")
    kept = {"type": "function", "function": {"name": function["name"], "arguments": text}}
    return {"id": call["id"], **kept} if isinstance(call.get("id"), str) else kept


def _tools_as_text(tools) -> str | None:
    tools = json_value(tools, "tools")
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
        functions = json_value(row.get("functions"), "functions")
    except RowError:
        return None
    if isinstance(functions, list) and all(isinstance(function, dict) for function in functions):
        return [{"type": "function", "function": function} for function in functions]
    return None


def _list(value, where: str) -> list:
    if not isinstance(value, list):
        raise RowError("wrong_type", f"{where}: 'tool_calls': expected a list, found {_kind(value)}")
    return value


def _kind(value) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)
