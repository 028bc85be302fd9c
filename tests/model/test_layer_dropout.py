"""LoRA's dropout in the layer written out: each adapter's input times a mask that is computed again when needed."""

import pytest
import torch
from reference_layers import (
    LAYERS,
    SUBSETS,
    adapted,
    assert_close,
    assert_equal,
    id_of,
    packed,
    padded,
    plain,
    run,
    written_out_copy,
)

from fitune.model.elementwise import Dropout, factors
from fitune.model.skeleton import decoder

PLACES = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 3, "up": 3, "down": 4}
"Linears that share an input share a dropout mask: its number among the four of a layer."


class _Fixed(torch.nn.Module):
    """Dropout with a mask that is known."""

    def __init__(self, mask: torch.Tensor):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


def _fix_dropout(model, p: float, keys: torch.Tensor, size: tuple[int, int]) -> None:
    for number, layer in enumerate(decoder(model).model.layers):
        for name, place in PLACES.items():
            linear = getattr(layer.mlp if name in ("gate", "up", "down") else layer.self_attn, f"{name}_proj")
            if hasattr(linear, "lora_dropout"):
                mask = factors(Dropout(p, keys, 4 * number + place), linear.in_features)
                linear.lora_dropout["default"] = _Fixed(mask.view(*size, -1))


def _random_keys(size: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(-(2**31), 2**31, (size[0] * size[1],), generator=generator).int()


@pytest.mark.parametrize("batch", [packed, padded])
@pytest.mark.parametrize("targets", SUBSETS, ids=id_of)
def test_dropout_multiplies_the_adapters_input_by_its_mask(targets, batch, exact, small_tiles):
    ours, theirs = batch()
    keys = _random_keys(ours["size"])
    model = adapted(plain(), targets, dropout=0.3)
    found = [run(written_out_copy(model, kept), ours, dropout_keys=keys) for kept in (0, 1, LAYERS)]
    _fix_dropout(model, 0.3, keys, ours["size"])
    expected = run(model, theirs)
    assert_close(found[0], expected)
    for other in found[1:]:
        assert_equal(other, found[0])


def test_dropout_needs_keys_in_training_alone(exact):
    model = adapted(plain(), dropout=0.3)
    ours, theirs = packed()
    with pytest.raises(ValueError, match=r"lora\.dropout needs dropout_keys beside the batch"):
        run(written_out_copy(model), ours)
    assert_close(run(written_out_copy(model).eval(), ours), run(model.eval(), theirs))
