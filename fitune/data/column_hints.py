"""Rows of no known format: what they seem to be, and the flags that read them."""

from fitune.data.row_formats import FORMATS

QUESTIONS = ("prompt", "question", "query", "problem", "instruction", "input", "user", "request", "source")
ANSWERS = ("completion", "response", "answer", "output", "solution", "assistant", "chosen", "reply", "target")
INPUTS = ("input", "context", "inputs")
TEXTS = ("content", "body", "document", "article", "markdown", "raw_content")
_NOT_ROWS = (
    (("input_ids",), "token ids; give the texts that they were made of"),
    (("segments",), "texts with a label each, as Axolotl's input_output; give prompt and completion, or messages"),
)


def hint_for(row: dict) -> str:
    """How to read rows with these columns, as far as names and values tell."""
    names = {name.lower(): name for name in reversed(row)}
    if found := next((said for columns, said in _NOT_ROWS if names.keys() >= set(columns)), None):
        return f"these are {found}"
    if mapped := _columns_of(row, names):
        return "to read them: --set 'data.columns={" + ", ".join(f"{a}: {b}" for a, b in mapped.items()) + "}'"
    formats = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in FORMATS.items())
    return f"formats: {formats}; map names in the recipe, such as data.columns: {{output: response}}"


def _columns_of(row: dict, names: dict[str, str]) -> dict[str, str]:
    """The format's name -> the row's, of the columns that look like it."""
    for name, value in row.items():
        turn = value[0] if isinstance(value, list) and value else None
        if isinstance(turn, dict) and not turn.keys().isdisjoint(("role", "from")):
            return {"messages" if "role" in turn else "conversations": name}

    def first(known: tuple[str, ...], *but: str | None) -> str | None:
        there = (names[name] for name in known if name in names)
        return next((name for name in there if isinstance(row[name], str) and name not in but), None)

    question = first(QUESTIONS)
    answer = first(ANSWERS, question)
    if question and answer:
        given = first(INPUTS, question, answer)
        kind = ("instruction", "output") if given or question.lower() == "instruction" else ("prompt", "completion")
        found = dict(zip(kind, (question, answer), strict=True)) | ({"input": given} if given else {})
        return {known: name for known, name in found.items() if known != name}
    text = first(TEXTS)
    return {"text": text} if text else {}
