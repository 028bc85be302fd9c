"""Keys of LoRA's dropout: what they depend on, what they don't, and how even the masks are that follow from them."""

import json
import math

import pytest
import torch
from ranks import run_ranks, train_here
from rounding import additions_to_a_step, assert_curve_equal_but_for_rounding

from fitune.model.dropout_keys import dropout_keys
from fitune.model.elementwise import Dropout, factors

LENGTHS = [5, 1, 9, 4]
P = 0.3


def _examples(lengths=LENGTHS, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 128_256, (length,), generator=generator) for length in lengths]


def _alone(example: torch.Tensor, seed: int = 1, step: int = 2) -> torch.Tensor:
    return dropout_keys(example.unsqueeze(0), None, None, seed, step)


def _packed(examples: list[torch.Tensor], seed: int = 1, step: int = 2) -> list[torch.Tensor]:
    lengths = [len(example) for example in examples]
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return list(dropout_keys(torch.cat(examples).unsqueeze(0), bounds, None, seed, step).split(lengths))


def _padded(examples: list[torch.Tensor], length: int, fill: int) -> list[torch.Tensor]:
    mask = torch.arange(length) < torch.tensor([[len(example)] for example in examples])
    ids = torch.full(mask.shape, fill)
    for row, example in zip(ids, examples, strict=True):
        row[: len(example)] = example
    keys = dropout_keys(ids, None, mask.long(), 1, 2).view(mask.shape)
    return [row[: len(example)] for row, example in zip(keys, examples, strict=True)]


def test_an_examples_keys_do_not_depend_on_its_company_or_on_padding():
    examples = _examples()
    expected = [_alone(example) for example in examples]
    for found in (
        _packed(examples),
        _packed(examples[::-1])[::-1],
        _packed(examples[:1]) + _packed(examples[1:]),
        _padded(examples, 9, fill=0),
        _padded(examples, 32, fill=7),
        _padded(examples[:2], 6, fill=0) + _padded(examples[2:], 9, fill=0),
    ):
        for ours, alone in zip(found, expected, strict=True):
            assert ours.dtype == torch.int32
            assert torch.equal(ours, alone)


def test_keys_differ_by_seed_step_example_and_position():
    [example] = _examples([64])
    other_end = torch.cat([example[:-1], example[-1:] ^ 1])
    swapped = torch.cat([example[1:2], example[:1], example[2:]])
    longer = torch.cat([example, example[:1]])
    kinds = [_alone(example, seed, step) for seed in range(4) for step in range(4)]
    kinds += [_alone(other_end), _alone(swapped), _alone(longer)]
    kinds += [_alone(example, seed=2**31 - 1), _alone(example, step=10**6)]
    kinds += [_alone(torch.full((64,), 5))]  # positions of equal tokens
    keys = torch.cat(kinds)
    # Of n keys that are random 32-bit numbers, n^2 / 2^33 pairs are expected to be equal: here one in 4,000 times one.
    assert len(keys.unique()) == len(keys)


def _masks(tokens: int, channels: int, places=(1,), p: float = P) -> list[torch.Tensor]:
    """[tokens, channels] at each place, True where an element is dropped."""
    [example] = _examples([tokens], seed=3)
    keys = _alone(example)
    return [factors(Dropout(p, keys, place), channels) == 0 for place in places]


def _assert_share(hits: torch.Tensor, p: float) -> None:
    """Hits of independent trials: within five standard deviations of their number, one chance in two million."""
    assert abs(hits.double().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / hits.numel())


@pytest.mark.parametrize("p", [0.05, 0.1, 0.3, 0.5, 0.9])
def test_the_share_dropped_is_p(p):
    [mask] = _masks(1000, 4096, p=p)
    _assert_share(mask, p)
    for values in (mask[:, 0], mask[:, -1], mask[0], mask[-1], mask[:, ::64], mask[::2]):
        _assert_share(values, p)


def test_what_is_kept_grows_by_what_is_lost():
    [example] = _examples([3])
    values = factors(Dropout(P, _alone(example), 1), 512)
    assert set(values.unique().tolist()) == {0.0, torch.tensor(1 / (1 - P)).item()}


def test_masks_of_two_places_tokens_and_channels_are_uncorrelated():
    """Both dropped: p^2 of the pairs."""
    masks = _masks(500, 4096, places=range(1, 9))  # two layers' places
    for n, one in enumerate(masks):
        for other in masks[n + 1 :]:
            _assert_share(one & other, P * P)
    for distance in (1, 2, 3, 4, 8, 64):
        _assert_share(masks[0][:-distance] & masks[0][distance:], P * P)
        _assert_share(masks[0][:, :-distance] & masks[0][:, distance:], P * P)


def test_masks_of_two_steps_and_of_two_examples_are_uncorrelated():
    [example] = _examples([500])
    near = torch.cat([example[:-1], example[-1:] ^ 1])
    masks = [
        factors(Dropout(P, keys, 1), 4096) == 0 for keys in (_alone(example), _alone(example, step=3), _alone(near))
    ]
    for other in masks[1:]:
        _assert_share(masks[0] & other, P * P)


def _losses(run) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


@pytest.mark.parametrize("packing", [False, True])
def test_two_ranks_train_as_one(packing, tiny_base, make_run, tmp_path):
    """With dropout, in other micro batches too."""
    options = {"batch": 8, "packing": packing, "max_length": 112, "lora": {"dropout": P}}
    options |= {"training": {"max_steps": 4, "learning_rate": 5e-3}}
    found = {}
    for name, processes, micro_batch, dropout in (("one", 1, 4, P), ("two", 2, 1, P), ("none", 1, 4, 0.0)):
        chosen = options | {"micro_batch": micro_batch, "lora": {"dropout": dropout}}
        run = make_run(tiny_base, tmp_path / name, "lora", processes=processes, **chosen)
        run_ranks(train_here, processes, run)
        found[name] = _losses(run)
    assert len(found["one"]) == 4
    for place, key in enumerate(("loss", "grad_norm")):
        one, two = ([step[place] for step in found[name]] for name in ("one", "two"))
        assert_curve_equal_but_for_rounding(two, one, additions_to_a_step(run), of=key)
    differences = [abs(a[1] / b[1] - 1) for a, b in zip(found["one"], found["none"], strict=True)]
    assert max(differences) > 1e-2  # the same masks, not none
