"""A turn whose content is a list of parts, as multimodal and reasoning data have it: texts, thinking, tool calls."""

from fitune.data.conversations import REASONING, RowError, quote

THINKING = ("reasoning", "thinking")
"Types of a part that holds what the assistant thought, under `text`, `value` or the type's own name."
TOOL_CALL = "tool_call"
"The type of a part that holds one call: JSON text or an object, under `value` or its own name."


def unpacked(turn: dict, where: str, *, is_answer: bool) -> dict:
    """The same turn with its parts where a turn without parts has them: content as text, thinking, `tool_calls`.

    Raises RowError for a part that is neither, such as an image, for thinking or a call outside of an answer, and for
    either in a turn that has some beside its parts.
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
    found = {REASONING[0]: "".join(thoughts), "tool_calls": calls}
    for name, others in ((REASONING[0], REASONING), ("tool_calls", ("tool_calls", "function_call"))):
        if found[name] and (twice := next((other for other in others if turn.get(other)), None)):
            raise RowError("wrong_type", f"{where}: '{twice}' stands beside parts of the content that say it, too")
    return turn | {key: "".join(texts)} | {name: value for name, value in found.items() if value}


def _text(part: dict, kind: str, where: str) -> str:
    text = _held(part, kind)
    if not isinstance(text, str):
        raise RowError("wrong_type", f"{where}: a part of type '{kind}' has no 'text'")
    return text


def _held(part: dict, kind: str):
    """The first that is not null: a table fills in what a row does not have."""
    return next((part[key] for key in ("text", "value", kind) if part.get(key) is not None), None)
