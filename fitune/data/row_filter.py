"""`keep` of a source: which of its rows are taken, by the values of their columns."""

import operator
import re

from fitune.config.fields import YES_OR_NO
from fitune.errors import UsageError

_COMPARISON = re.compile(r"\s*(>=|<=|>|<)\s*(-?\d+(?:\.\d+)?)\s*")
_OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def check_filter(keep: dict) -> None:
    """Raises UsageError for a condition that no row could meet because it is mistyped."""
    for column, wanted in keep.items():
        if isinstance(wanted, str) and wanted.strip()[:1] in ("<", ">") and not _COMPARISON.fullmatch(wanted):
            raise UsageError(f"keep: {column}: {wanted!r}: expected a comparison with a number, such as '>= 4'")


def is_kept(row: dict, keep: dict) -> bool:
    """Whether each column of `keep` has the value, one of the values, or a number as the comparison says."""
    return all(_meets(row.get(column), wanted) for column, wanted in keep.items())


def _meets(value, wanted) -> bool:
    if isinstance(wanted, list):
        return any(_meets(value, one) for one in wanted)
    if isinstance(wanted, str) and (comparison := _COMPARISON.fullmatch(wanted)):
        number = _number(value)
        return number is not None and _OPERATORS[comparison[1]](number, float(comparison[2]))
    if isinstance(value, bool) and isinstance(wanted, str):  # YAML files keep these words as they are written
        return value == YES_OR_NO.get(wanted.lower(), wanted)
    if isinstance(value, str) and not isinstance(wanted, str):  # CSV files hold text
        return value.strip().lower() == str(wanted).lower()
    return value == wanted


def _number(value) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
