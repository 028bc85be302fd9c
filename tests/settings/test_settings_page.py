"""docs/settings.md speaks of every field of SFTConfig and every optimizer that are installed, as fitune treats them."""

import re

from settings_page import PAGE
from trials import fields_not_set_here, optimizers_not_used, trials

from fitune.config.installed_names import sft_config_fields
from fitune.config.optimizers import ARGUMENTS, all_optimizers, nearest_fit
from fitune.config.shipped import pinned_versions
from fitune.config.training_fields import OWNED_ELSEWHERE, REFUSED

TEXT = PAGE.read_text(encoding="utf-8")
AGAIN = "run `make settings`"


def tables() -> list[list[list[str]]]:
    """The page's tables: rows of cells, without heads."""
    found = re.findall(r"((?:^\|.*\|\n)+)", TEXT, flags=re.M)
    rows = [[re.split(r"(?<!\\) \| ", line[2:-2].rstrip()) for line in table.splitlines()][2:] for table in found]
    return [[[_text(cell) for cell in row] for row in table] for table in rows]


def _text(cell: str) -> str:
    text = cell.strip().replace("\\|", "|")
    return text[1:-1] if text.startswith("`") and text.endswith("`") else text


WORKS, OWNED, REFUSED_HERE, OPTIMIZERS, OTHER_OPTIMIZERS = tables()


def test_every_field_stands_in_one_table():
    works, owned, refused = ({row[0] for row in table} for table in (WORKS, OWNED, REFUSED_HERE))
    assert (owned, refused) == (set(OWNED_ELSEWHERE), set(REFUSED)), AGAIN
    assert works == set(sft_config_fields()) - owned - refused, AGAIN
    assert f"the {len(sft_config_fields())} fields" in " ".join(TEXT.split()), AGAIN


def test_the_page_says_what_the_errors_say():
    assert {field: text for field, text in OWNED} == OWNED_ELSEWHERE, AGAIN
    assert {field: text for field, text in REFUSED_HERE} == REFUSED, AGAIN
    assert {trial.field for trial in fields_not_set_here()} == set(OWNED_ELSEWHERE) | set(REFUSED)


def test_every_trial_is_on_the_page():
    assert [(row[0], row[2]) for row in WORKS] == [(trial.field, trial.written) for trial in trials()], AGAIN
    assert all(row[3] for row in WORKS)


def test_every_optimizer_stands_in_one_table():
    assert [row[0] for row in OPTIMIZERS] == list(ARGUMENTS), AGAIN
    assert {cell for row in OPTIMIZERS for cell in row[1:]} == {"exact"}
    assert [row[0] for row in OTHER_OPTIMIZERS] == optimizers_not_used(), AGAIN
    assert {row[0]: row[2] for row in OTHER_OPTIMIZERS} == {name: nearest_fit(name) for name in optimizers_not_used()}
    assert set(all_optimizers()) == {row[0] for row in (*OPTIMIZERS, *OTHER_OPTIMIZERS)}


def test_the_page_was_made_with_the_pinned_versions():
    pins = pinned_versions()
    assert f"Made with transformers {pins['transformers']} and trl {pins['trl']}." in TEXT, AGAIN
    assert "Traceback" not in TEXT
