"""What an assistant thought before it answered, beside the answer's text, and whether the chat template writes it."""

from fitune.data.conversations import REASONING, RowError, kind_of


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
            raise RowError("wrong_type", f"{where}: '{name}': expected text, found {kind_of(value)}")
        if value.strip():
            found[name] = value
    if len(set(found.values())) > 1:
        raise RowError("wrong_type", f"{where}: {' and '.join(map(repr, found))} differ; keep one")
    return next(iter(found.values()), None)


def add_reasoning_of_the_row(row: dict, messages: list[dict]) -> None:
    """Thinking that stands in a column beside the turns belongs to the row's answer.

    A word alone, such as `reasoning: on`, says something about the row. Raises RowError where the row has several
    answers, or one with other thinking of its own.
    """
    found = {name: row[name] for name in REASONING if _is_thinking(row.get(name), name)}
    if not found:
        return
    answers = [message for message in messages if message["role"] == "assistant" and message.get("train", True)]
    if len(answers) != 1:
        raise RowError(
            "wrong_type",
            f"'{next(iter(found))}' of the whole row does not say which of its {len(answers)} answers it belongs to; "
            f"put it into that turn, or name it in data.ignored_keys",
        )
    [answer] = answers
    answer[REASONING[0]] = reasoning_of(answer | found, "the row")


def _is_thinking(value, name: str) -> bool:
    return isinstance(value, str) and len(value.split()) > (0 if name == REASONING[0] else 1)


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
