"""How many checkpoints lie on the disk where the recipe sets no limit."""

import json

import pytest

from fitune.config import run as runs
from fitune.planning.run_length import SAVES_WITHOUT_LIMIT, kept_checkpoints

NO_LIMIT = "training.save_total_limit=null"


def _kept(*sets: str, folder: str = "nowhere") -> int:
    sets = (NO_LIMIT, f"data.prepared={folder}", *(f"training.{item}" for item in sets))
    return kept_checkpoints(runs.resolve("llama3_8b_qlora", "single_gpu", sets))


@pytest.mark.parametrize(("share", "saves"), [("0.1", 10), ("0.3", 4), ("0.5", 2)])
def test_a_share_of_the_steps_is_saved_so_often(share, saves):
    assert _kept("save_strategy=steps", f"save_steps={share}") == saves


@pytest.mark.parametrize(("epochs", "saves"), [("1", 1), ("10", 10), ("2.5", 3)])
def test_each_epoch_is_saved(epochs, saves):
    assert _kept("save_strategy=epoch", f"num_train_epochs={epochs}") == saves


def test_steps_that_are_given_are_as_many_epochs_as_they_take(tmp_path):
    report = {"max_length": 3072, "packing": True, "packed_rows": 100, "packing_efficiency": 0.9, "train_rows": 700,
              "tokens": {"total": 276_480}}  # fmt: skip
    (tmp_path / "report.json").write_text(json.dumps(report), encoding="utf-8")
    of_epochs = ("save_strategy=epoch", "max_steps=60")
    assert _kept(*of_epochs, folder=str(tmp_path)) == 5  # 100 rows, 8 a step: 13 steps an epoch
    assert _kept(*of_epochs) == SAVES_WITHOUT_LIMIT


def test_steps_between_saves_count_where_the_steps_are_known():
    assert _kept("save_strategy=steps", "save_steps=50", "max_steps=520") == 11
    assert _kept("save_strategy=steps", "save_steps=50") == SAVES_WITHOUT_LIMIT
    assert _kept("save_strategy=no") == 0
