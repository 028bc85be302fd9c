"""Which answers are trained: the flags that other tools put on a turn or a row, and the recipe's `train_on`."""

import re
from collections.abc import Collection
from functools import lru_cache

from fitune.data.conversations import RowError, quote

WEIGHTS = ("weight", "loss_weight", "loss_mask")
"Keys of a turn: 1 is trained, 0 is not. On a turn that is no answer a 1 is only a default."
FLAGS = (
    "train",
    "trained",
    "training",
    "trainable",
    "loss",
    "has_loss",
    "need_loss",
    "compute_loss",
    "learn",
    *WEIGHTS,
)
"Keys of a turn that say whether it is trained."
MASKS = ("mask", "masked", "ignore", "ignore_loss", "no_loss")
"Keys of a turn that say whether it is not."
_MEANS_BOTH = {"mask": (int, float), "loss_mask": (bool,)}
"Whether mask: 1 is trained, or loss_mask: true, depends on the tool that wrote it."
_WORDS = {
    *("train", "trained", "training", "trainable", "learn"),
    *("loss", "losses", "mask", "masks", "masked", "masking", "weight", "weights"),
}
_SAY_NOTHING = {"role", "content", "from", "value", "name", "tool_calls", "tool_call_id"}
"The usual keys of a turn: most turns have no others."
TEMPLATE_ARGUMENTS = ("chat_template_kwargs", "chat_template")
_USERS = ("user", "human")
ADVICE = "if it says nothing about training, name it in data.ignored_keys"


def is_trained(turn: dict, role: str, where: str) -> bool:
    """What the turn's own flags say, true where it has none. Raises RowError for flags that cannot be followed."""
    if turn.keys() <= _SAY_NOTHING:
        return True
    said = {}
    for key, value in turn.items():
        if value is None:
            continue
        if key in FLAGS or key in MASKS:
            said[key] = _as_bool(key, value, where) != (key in MASKS)
        elif _looks_like_a_flag(key, value):
            raise RowError(
                "unknown_flag",
                f"{where}: '{key}' looks like a flag of what is trained, but it is not one that is known; rename it "
                f"to 'train', true or false for the whole turn; {ADVICE}",
            )
    if len(set(said.values())) > 1:
        raise RowError("unknown_flag", f"{where}: {' and '.join(map(repr, said))} contradict each other; keep one")
    for key, trained in said.items():
        if trained and role != "assistant" and key not in WEIGHTS:
            raise RowError(
                "unknown_flag", f"{where}: '{key}: {turn[key]}' on a turn of the {role}: only answers are trained"
            )
    return next(iter(said.values()), True)


def refuse_flags_of_the_row(row: dict, known: Collection[str]) -> None:
    """Raises RowError for a flag of a whole row, unless it says what is done anyway; `known` columns are none."""
    for key, value in row.items():
        if key in known or value is None or not _looks_like_a_flag(key, value) or _is_done_anyway(key, value):
            continue
        keep = f"keep the rows to train on, such as data.keep={{{key}: {_value_that_trains(key, value)}}}"
        if isinstance(value, list):
            keep = "write for each turn whether it is trained: 'train', true or false"
        raise RowError("row_flag", f"'{key}: {quote(str(value))}' looks like a flag of the whole row; {keep}; {ADVICE}")


def refuse_template_arguments(row: dict) -> None:
    """Raises RowError for a row that brings its own chat template, or arguments for it, as TRL's rows may."""
    for key in TEMPLATE_ARGUMENTS:
        value = row.get(key)
        if isinstance(value, dict):
            value = {name: argument for name, argument in value.items() if argument is not None}
        if value:
            raise RowError(
                "row_template",
                f"'{key}: {quote(str(value))}' asks for another template text in this row; all rows have the recipe's "
                f"template: name it in data.ignored_keys, or keep rows of one kind (data.keep)",
            )


def _value_that_trains(key: str, value) -> str:
    """In the words that the column's values have."""
    yes, no = {"yes": ("'yes'", "'no'"), "no": ("'yes'", "'no'")}.get(str(value).lower(), ("true", "false"))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yes, no = '">= 1"', "0"
    return no if key in MASKS else yes


def trained_answers(messages: list[dict], train_on: str) -> list[bool]:
    """For each answer whether it is trained: not flagged off, and one of those that `train_on` means.

    These are all, the last, or those after the user's last turn (completion).
    """
    if train_on == "all":
        return [turn.get("train", True) for turn in messages if turn["role"] == "assistant"]
    places = {role: [n for n, turn in enumerate(messages) if turn["role"] == role] for role in ("user", "assistant")}
    first = max(places["assistant" if train_on == "last" else "user"], default=0)
    return [place >= first and messages[place].get("train", True) for place in places["assistant"]]


def check_something_is_trained(messages: list[dict], train_on: str) -> None:
    """Raises RowError for a conversation of which no answer is trained."""
    if not any(trained_answers(messages, train_on)):
        of = "" if train_on == "all" else f" of those that train_on: {train_on} means"
        raise RowError("nothing_trained", f"every answer{of} is flagged as not to be trained: nothing to learn from")


@lru_cache(1000)
def _words(key: str) -> tuple[str, ...]:
    """`train_on_inputs` and `trainOnInputs` in lower case words."""
    return tuple(re.sub(r"([a-z])([A-Z])", r"\1_\2", key).lower().split("_"))


def _looks_like_a_flag(key: str, value) -> bool:
    """By its name, and by a value that can say yes or no for the whole, or for each of its parts."""
    if key not in MASKS and _WORDS.isdisjoint(_words(key)):
        return False
    if isinstance(value, str):
        return _word(value) is not None or (key in MASKS and value.lower() in (*_USERS, "assistant", "gpt"))
    return isinstance(value, (bool, int, float)) or (isinstance(value, list) and bool(value))


def _is_done_anyway(key: str, value) -> bool:
    """Rows are trained, with a weight of 1, their answers alone."""
    if key in MASKS or _words(key)[:2] == ("train", "on"):
        return value in (False, 0) or str(value).lower() in (*_USERS, "false", "0", "no")
    return value in (True, 1) or str(value).lower() in ("true", "1", "yes")


def _as_bool(key: str, value, where: str) -> bool:
    value = _word(value) if isinstance(value, str) and _word(value) is not None else value
    if type(value) in _MEANS_BOTH.get(key, ()):
        raise RowError(
            "unknown_flag",
            f"{where}: '{key}: {value}' means one thing in one tool and another in the next; rename it"
            " to 'train', true or false",
        )
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    if isinstance(value, (int, float)):
        raise RowError(
            "fractional_weight",
            f"{where}: '{key}: {value}': a turn is trained (1) or not (0), nothing between; round it; {ADVICE}",
        )
    raise RowError(
        "unknown_flag", f"{where}: '{key}': expected true, false, 1 or 0, found {quote(str(value))}; {ADVICE}"
    )


def _word(text: str) -> bool | None:
    return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.strip().lower())
