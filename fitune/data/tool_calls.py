"""Tool calls and the tools themselves, in the one shape that they are stored in: OpenAI's, with JSON texts inside."""

import json

from fitune.data.conversations import REASONING, Message, RowError, json_value, kind_of


def calls_of(turn: dict, where: str) -> list[dict]:
    """The calls of a turn, as OpenAI names them today or did before. Raises RowError."""
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    if not isinstance(calls, list):
        raise RowError("wrong_type", f"{where}: 'tool_calls': expected a list, found {kind_of(calls)}")
    return [_tool_call(call, where) for call in calls]


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


def with_calls_joined(turns: list[tuple[bool, Message]]) -> list[Message]:
    """The messages; a call that is a turn of its own, (True, its message), becomes one of the answer before it.

    Tools that write calls so write several at once as several turns, and what is said beside them as one more.
    """
    messages = []
    for is_call, message in turns:
        before = messages[-1] if messages else {}
        joins = is_call and before.get("role") == "assistant" and before.get("train") == message.get("train")
        if joins and REASONING[0] not in message:
            before["tool_calls"] = before.get("tool_calls", []) + message["tool_calls"]
        else:
            messages.append(message)
    return messages


def tools_of(row: dict, format: str) -> str | None:
    """The tools of a row as JSON text, None where it has none. Raises RowError."""
    tools = row.get("tools") or (_old_functions(row) if format == "messages" else None)
    tools = json_value(tools, "tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("wrong_type", f"'tools': expected a list of objects, found {kind_of(tools)}")
    return _as_json(tools, "'tools'")


def _old_functions(row: dict) -> list | None:
    """OpenAI's `functions`, as tools were called before; a column of that name with other contents is ignored."""
    try:
        functions = json_value(row.get("functions"), "functions")
    except RowError:
        return None
    if isinstance(functions, list) and all(isinstance(function, dict) for function in functions):
        return [{"type": "function", "function": function} for function in functions]
    return None


def _as_json(value, where: str) -> str:
    """As a template will write it, without escapes that hide a token."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise RowError(
            "wrong_type", f"{where}: a number is infinite or not a number, which JSON has no word for"
        ) from None
