"""The list of faults that the tests must notice: a TOML file for each wing beside this module.

An entry's name says what is wrong. `text` stands exactly once in `file` and becomes `becomes`; one of `tests`, files or
node ids, must then fail. The faults are chosen by hand: subtle, of a kind that is easy to make, one for each promise.
"""

import ast
import tomllib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WINGS = (
    *("config", "data", "planning", "model", "weights", "export", "launching", "report"),
    *("optimizers", "training", "cli"),
)


@dataclass(frozen=True)
class Fault:
    """One entry of the list."""

    wing: str
    name: str
    file: str
    "From the top of the checkout, as in `tests`."
    text: str
    becomes: str
    tests: tuple[str, ...]


def read_faults(wing: str) -> list[Fault]:
    """A wing's faults, in the order of its file."""
    entries = tomllib.loads((HERE / f"{wing}.toml").read_text(encoding="utf-8"))
    return [
        Fault(wing, name, entry["file"], entry["text"], entry["becomes"], tuple(entry["tests"]))
        for name, entry in entries.items()
    ]


def all_faults() -> list[Fault]:
    return [fault for wing in WINGS for fault in read_faults(wing)]


def planted(fault: Fault, root: Path = ROOT) -> str:
    """The file's text with the fault in it. Raises ValueError if it cannot be made, SyntaxError if it is no Python."""
    source = (root / fault.file).read_text(encoding="utf-8")
    if source.count(fault.text) != 1:
        raise ValueError(f"{fault.file}: the text stands there {source.count(fault.text)} times, not once")
    changed = source.replace(fault.text, fault.becomes)
    if changed == source:
        raise ValueError(f"{fault.file}: nothing is changed")
    if fault.file.endswith(".py"):
        ast.parse(changed)
    return changed


def missing_tests(fault: Fault, root: Path = ROOT) -> list[str]:
    """Those of its tests that are not there."""
    return [test for test in fault.tests if not _exists(test, root)]


def _exists(test: str, root: Path) -> bool:
    file, _, function = test.partition("::")
    if not (root / file).is_file():
        return False
    name = function.partition("[")[0]
    return not name or f"\ndef {name}(" in (root / file).read_text(encoding="utf-8")
