"""Who says a turn, under the names that tools give them."""

from fitune.data.conversations import RowError, quote

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "function_response": "tool",
    "function_call": "function_call",
    "tool_call": "function_call",
}
"A name in small letters, and whose it is. A `function_call` is the assistant's, with the call as its content."
ANSWERS = ("assistant", "function_call")


def role_of(turn: dict, where: str) -> str:
    """One of the values of ROLES. Raises RowError for a turn without a role, or with one that nobody has."""
    given = turn.get("role", turn.get("from"))
    if given is None:
        raise RowError("missing_field", f"{where}: no 'role'")
    if role := _known(given):
        return role
    raise RowError(
        "unknown_role",
        f"{where}: unknown role {quote(str(given))}; allowed: system, user, assistant, tool, and what other tools "
        f"call them, such as human and gpt",
    )


def is_answer(turn) -> bool:
    """Whether the assistant says it. Of anything that is no turn: no."""
    return isinstance(turn, dict) and _known(turn.get("role", turn.get("from"))) in ANSWERS


def _known(given) -> str | None:
    return ROLES.get(given.strip().lower()) if isinstance(given, str) else None
