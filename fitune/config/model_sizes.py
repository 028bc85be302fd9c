"""Names of model sizes in a profile's `fits`, such as `8b`. Which of them a model has, its config.json says."""

import re

ANY, TINY = "any", "tiny"
TINY_PARAMETERS = 0.2e9
"A model with no more than these is `tiny`."
SAME_SIZE = 1.25
"Models whose numbers of parameters differ by no more than this factor have one size: 8b is 6.4 to 10 billion."
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)([bm])")


def checked_size(name: str) -> str:
    """The name of a size. Raises ValueError for what is none."""
    if name in (ANY, TINY) or _NUMBER.fullmatch(name):
        return name
    raise ValueError(f"'{name}' is no size of a model: write 8b, 70b or 135m, {TINY} or {ANY}")


def is_of_size(parameters: int | None, name: str) -> bool:
    """Whether a model has the size called `name`. None: it is not known, as of a model that is not there yet.

    Such a model may be tried out where tiny ones are: it counts as one of them.
    """
    if name == ANY:
        return True
    if name == TINY:
        return parameters is None or parameters <= TINY_PARAMETERS
    number, unit = _NUMBER.fullmatch(name).groups()
    stated = float(number) * {"b": 1e9, "m": 1e6}[unit]
    return parameters is not None and 1 / SAME_SIZE <= parameters / stated <= SAME_SIZE
