"""One row of any usual format as a conversation."""

from collections.abc import Collection

from fitune.data.content_parts import unpacked
from fitune.data.conversations import REASONING, Message, RowError, json_value, kind_of
from fitune.data.reasoning import add_reasoning_of_the_row, reasoning_of
from fitune.data.roles import is_answer, role_of
from fitune.data.tool_calls import calls_of, tools_of, with_calls_joined
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
    "messages": ("tools", *REASONING),
    "sharegpt": ("system", "tools", *REASONING),
    "alpaca": ("input", "system", "history", *REASONING),
    "prompt_completion": ("system", *REASONING),
    "text": (),
}
READ_COLUMNS = {name: {*FORMATS[name], *OPTIONAL_COLUMNS[name]} for name in FORMATS}
"Of each format all columns that are read."
MEDIA_COLUMNS = ("images", "videos", "audios")


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
    turns = [_turn(turn, where, ignored_keys) for where, turn in _CONVERTERS[format](row)]
    messages = [
        message for message in with_calls_joined(turns) if message["role"] != "system" or message["content"].strip()
    ]
    add_reasoning_of_the_row(row, messages)
    if system_message and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, Message({"role": "system", "content": system_message}, "system_message"))
    conversation = {"messages": messages}
    if tools := tools_of(row, format):
        conversation["tools"] = tools
    return conversation


def _document(text) -> str:
    if not isinstance(text, str):
        raise RowError("wrong_type", f"'text': expected text, found {kind_of(text)}")
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
            raise RowError("wrong_type", f"history[{number}]: expected [question, answer], found {kind_of(pair)}")
        yield f"history[{number}][0]", {"role": "user", "content": pair[0]}
        yield f"history[{number}][1]", {"role": "assistant", "content": pair[1]}
    question = [row["instruction"], row.get("input")]
    for column, text in zip(("instruction", "input"), question, strict=True):
        if text is not None and not isinstance(text, str):
            raise RowError("wrong_type", f"'{column}': expected text, found {kind_of(text)}")
    yield "instruction", {"role": "user", "content": "\n\n".join(text for text in question if text and text.strip())}
    yield "output", {"role": "assistant", "content": row["output"]}


def _from_prompt_completion(row):
    if row.get("system"):
        yield "system", {"role": "system", "content": row["system"]}
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row[column], (list, dict)):
            for where, turn in _turns(row, column):
                yield where, turn | {"train": False} if column == "prompt" and is_answer(turn) else turn
        else:
            yield column, {"role": role, "content": row[column]}


_CONVERTERS = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
}


def _turns(row: dict, column: str):
    turns = json_value(row[column], column)
    turns = [turns] if isinstance(turns, dict) else turns
    if not isinstance(turns, list):
        raise RowError("wrong_type", f"'{column}': expected a list of turns, found {kind_of(turns)}")
    for number, turn in enumerate(turns):
        yield f"{column}[{number}]", turn


def _turn(turn, where: str, ignored_keys: Collection[str]) -> tuple[bool, Message]:
    """Whether it is a call that is a turn of its own, and the turn as it is kept.

    That is `role`, `content` and, where it has them, `tool_calls`, `tool_call_id`, `name`, thinking, `train`.
    """
    if not isinstance(turn, dict):
        raise RowError("wrong_type", f"{where}: expected an object with 'role' and 'content', found {kind_of(turn)}")
    if ignored_keys:
        turn = {key: value for key, value in turn.items() if key not in ignored_keys}
    role, answers = role_of(turn, where), is_answer(turn)
    turn = unpacked(turn, where, is_answer=answers)
    trained = is_trained(turn, "assistant" if answers else role, where)
    thinking = reasoning_of(turn, where) if answers else None
    if is_call := role == "function_call":
        calls = json_value(_content(turn, where, False), where)
        turn, role = {"content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}, "assistant"
    calls = calls_of(turn, where)
    message = Message({"role": role, "content": _content(turn, where, optional=bool(calls))}, where)
    if calls:
        message["tool_calls"] = calls
    for key in ("name", "tool_call_id") if role == "tool" else ():
        if isinstance(turn.get(key), str):
            message[key] = turn[key]
    if thinking is not None:
        message[REASONING[0]] = thinking
    if answers and not trained:
        message["train"] = False
    return is_call, message


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
        raise RowError("wrong_type", f"{where}: '{key}': expected text, found {kind_of(content)}")
    return content
