"""A turn whose content is a list of parts, as multimodal and reasoning data have it: texts, thinking, tool calls."""

from fitune.data.conversations import REASONING, RowError, quote

THINKING = ("reasoning", "thinking")
"Types of a part that holds what the assistant thought, under `text`, `value` or the type's own name."
TOOL_CALL = "tool_call"
"The type of a part that holds one call: JSON text or an object, under `value` or its own name."


def unpacked(turn: dict, where: str, *, is_answer: bool) -> dict:
    """The same turn with its parts where a turn without parts has them: content as text, thinking, `tool_calls`.

    Raises RowError for a part that is neither, such as an image, and for thinking or a call outside of an answer.
    """
    key = next((key for key in ("content", "value") if isinstance(turn.get(key), list)), None)
    if key is None:
        return turn
    texts, thoughts, calls = [], [], []
    for part in turn[key]:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind == "text":
            texts.append(_text(part, kind, where))
        elif is_answer and kind in THINKING:
            thoughts.append(_text(part, kind, where))
        elif is_answer and kind == TOOL_CALL:
            calls.append(_held(part, kind))
        else:
            found = f"found a part of type {quote(str(kind))}"
            raise RowError("wrong_type", f"{where}: only text can be trained on, {found}")
    turn = turn | {key: "".join(texts)}
    if thoughts:
        turn = turn | {REASONING[0]: "".join(thoughts)}
    return turn | {"tool_calls": calls} if calls else turn


def _text(part: dict, kind: str, where: str) -> str:
    text = _held(part, kind)
    if not isinstance(text, str):
        raise RowError("wrong_type", f"{where}: a part of type '{kind}' has no 'text'")
    return text


def _held(part: dict, kind: str):
    return next((part[key] for key in ("text", "value", kind) if key in part), None)
