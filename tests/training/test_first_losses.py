"""Updates of small states are AdamW's in float32, on average; rounded to bf16 for a pass, float32 ones are not seen."""

import pytest

from benchmarks import first_losses
from benchmarks.first_losses import EXACT, KINDS


@pytest.fixture(scope="module")
def found() -> dict:
    model = first_losses.random_model(layers=2, hidden=128, vocabulary=1024)
    data = first_losses.batches(1024, 5)
    return {kind: first_losses.trained(model, kind, data) for kind in KINDS}


@pytest.mark.parametrize("kind", ["bf16 weights, float32 moments", "bf16_8bit"])
def test_small_states_move_weights_as_float32_does_on_average(kind, found):
    """700,000 weights, each of which a draw moves by up to 12 times the rate: 1 % of the sum is drawn."""
    share = first_losses.shares(found[kind]["moved"], found[EXACT]["moved"])["all"]
    assert share == pytest.approx(1, abs=0.04)


def test_a_pass_with_float32_weights_rounded_to_bf16_sees_a_fifth_of_the_first_update(found):
    """Why losses with small states fall sooner: docs/memory.md says how far they lie apart."""
    (rounded,) = (kind for kind, (dtype, seen, _) in KINDS.items() if seen and "float32, rounded" in kind)
    share = first_losses.shares(found[rounded]["moved"], found[EXACT]["moved"])["all"]
    assert 0.05 < share < 0.3
    exact, small, late = (found[kind]["losses"] for kind in (EXACT, "bf16_8bit", rounded))
    fell = [losses[1] - losses[2] for losses in (exact, small, late)]
    assert abs(small[2] - exact[2]) < abs(late[2] - exact[2]) / 5, fell
