"""Losses that TRL computes itself: what is logged beside them counts the same tokens, on any ranks."""

import json

import pytest
from ranks import run_ranks, train_here

LOGGED = ("num_tokens", "entropy", "mean_token_accuracy")
STEPS = 4


def _logged(make_run, base, folder, processes: int, **training) -> list[dict[str, float]]:
    """Steps of five packed rows, whose epochs end with rows that fill up a step."""
    training |= {"max_steps": STEPS, "learning_rate": 1e-9, "lr_scheduler_type": "constant"}
    options = {"batch": 5, "packing": True, "max_length": 112, "training": training}
    run = make_run(base, folder, "lora", processes=processes, **options)
    run_ranks(train_here, processes, run)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in LOGGED} for line in lines if "loss" in line]


@pytest.mark.parametrize(
    ("loss", "processes"), [({"label_smoothing_factor": 0.1}, 3), ({"loss_type": "dft"}, 1)], ids=str
)
def test_what_is_logged_beside_the_loss_is_that_of_the_usual_one(loss, processes, make_run, tiny_base, tmp_path):
    expected = _logged(make_run, tiny_base, tmp_path / "nll", 1)
    found = _logged(make_run, tiny_base, tmp_path / "other", processes, **loss)
    assert [line["num_tokens"] for line in found] == [line["num_tokens"] for line in expected]
    for line, reference in zip(found, expected, strict=True):
        assert line == pytest.approx(reference, rel=1e-3)
