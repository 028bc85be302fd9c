"""What an assistant thought before it answered, beside the answer's text, and whether the chat template writes it."""

from fitune.data.conversations import REASONING, RowError


def reasoning_of(turn: dict, where: str) -> str | None:
    """The turn's thinking as text. Raises RowError for another kind of value, or two that differ."""
    if turn.keys().isdisjoint(REASONING):
        return None
    found = {}
    for name in REASONING:
        value = turn.get(name)
        if value is None or value == "" or value == []:
            continue
        if not isinstance(value, str):
            raise RowError("wrong_type", f"{where}: '{name}': expected text, found {type(value).__name__}")
        if value.strip():
            found[name] = value
    if len(set(found.values())) > 1:
        raise RowError("wrong_type", f"{where}: {' and '.join(map(repr, found))} differ; keep one")
    return next(iter(found.values()), None)


def unwritten_reasoning(messages: list[dict], trained: list[bool], text: str, spans, template: str) -> list[int]:
    """Numbers of the messages whose thinking the template left out.

    Of an answer that is trained it must stand in its span; of another one a template that knows thinking may leave it
    out, as it does when the model is asked.
    """
    knows_thinking = any(name in template for name in REASONING)
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    places = iter(spans)
    unwritten = []
    for number, is_trained in zip(answers, trained, strict=True):
        written = text[slice(*next(places))] if is_trained else text
        thought = messages[number].get(REASONING[0])
        if thought and thought.strip() not in written and (is_trained or not knows_thinking):
            unwritten.append(number)
    return unwritten
