"""Preference data: pairs of answers, or answers with a verdict. Training would take the bad ones for good."""

import itertools

from fitune.data.conversations import RowError

PAIRS = (
    ("chosen", "rejected"),
    ("chosen_messages", "rejected_messages"),
    ("preferred_output", "non_preferred_output"),
    ("response_j", "response_k"),
    ("answer_a", "answer_b"),
    ("response_a", "response_b"),
    ("completion_a", "completion_b"),
)
"A good answer and a bad one, or two of which a further column says which is better."
VERDICTS = ("label", "kto_tag", "thumbs_up", "is_good", "is_chosen", "is_preferred")
"Columns of true and false."
RATINGS = ("rating", "ratings", "score", "scores", "reward", "stars", "helpfulness", "quality", "overall_score")
QUESTIONS = ("prompt", "question", "instruction", "input", "messages", "conversations")
ANSWERS = ("completion", "output", "response", "answer", "messages", "conversations")


def refuse_preferences(row: dict, *, answer_is_named: bool, kept_by: tuple[str, ...]) -> None:
    """Raises RowError for a row with a pair of answers or a verdict.

    `row` has its own column names. `answer_is_named`: the recipe's `columns` or `format` say which answer to take.
    `kept_by`: the columns that the recipe's `keep` decides by.
    """
    if _SUSPECTS.isdisjoint(row):
        return
    there = {key for key in _SUSPECTS.intersection(row) if row[key] is not None}
    if not answer_is_named:
        for pair in PAIRS:
            if there.issuperset(pair) or (pair == PAIRS[0] and there.intersection(pair)):
                raise RowError("preference_data", _about_pair(row, [name for name in pair if name in there]))
    for column in (*VERDICTS, *RATINGS):
        if column in there and column not in kept_by and _is_verdict(column, row):
            good = "true" if isinstance(row[column], bool) else '">= 4"'
            raise RowError(
                "preference_data",
                f"preference data, '{column}: {row[column]}' rates the answer, and good and bad ones would be trained "
                f"alike; train on the good ones: --set 'data.keep={{{column}: {good}}}'; on all: --set "
                f"'data.ignored_keys=[{column}]'",
            )


_SUSPECTS = frozenset(itertools.chain(*PAIRS, VERDICTS, RATINGS))


def _is_verdict(column: str, row: dict) -> bool:
    value = row[column]
    if row.keys().isdisjoint(ANSWERS):
        return False
    if column in VERDICTS:
        return isinstance(value, bool)
    return isinstance(value, (bool, int, float))


def _about_pair(row: dict, names: list[str]) -> str:
    found = f"preference data, {' and '.join(map(repr, names))} are answers of which one is better"
    if len(names) == 1:
        found = f"preference data, '{names[0]}' is one of two answers"
    return f"{found}; only good answers can be trained on: {_how_to_take(names[0], row)}"


def _how_to_take(good: str, row: dict) -> str:
    """The flag that trains on the column `good`, as its rows look."""
    if good in ("rejected", "rejected_messages", "non_preferred_output"):
        return "there are none in this row"
    if good.endswith(("_a", "_j")):
        return "write the better of the two into a column of its own, and name that in data.columns"
    asked = row.get("input")
    if isinstance(asked, dict) and isinstance(asked.get("messages"), list):
        return f"jq -c '{{prompt: .input.messages, completion: .{good}}}' writes them"
    question = next((name for name in QUESTIONS if isinstance(row.get(name), (str, list))), None)
    is_whole = isinstance(row[good], list) and (len(row[good]) > 1 or question is None)
    if is_whole and isinstance(row[good][0], dict):
        kind, column = ("messages", "messages") if "role" in row[good][0] else ("sharegpt", "conversations")
        return f"--set 'data.columns={{{column}: {good}}}' --format {kind}"
    if question is None:
        return f"split '{good}' into turns, {{\"messages\": [...]}}: a text alone does not say who speaks"
    prompt = "" if question == "prompt" else f"prompt: {question}, "
    return f"--set 'data.columns={{{prompt}completion: {good}}}' --format prompt_completion"
