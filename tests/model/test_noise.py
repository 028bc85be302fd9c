"""NEFTune's noise: as large as the paper has it for each example, and the same on any ranks and in any row."""

import json
import math

import pytest
import torch
from ranks import run_ranks, train_here
from rounding import additions_to_a_step, assert_curve_equal_but_for_rounding
from torch import nn

from fitune.model.dropout_keys import dropout_keys
from fitune.model.noise import EmbeddingNoise, lengths_of_examples, noise

ALPHA, HIDDEN = 5.0, 32
LENGTHS = [5, 1, 9, 4]


def _noise_of(ids: torch.Tensor, bounds=None, mask=None) -> torch.Tensor:
    """[rows x length, HIDDEN]: what is added to embeddings that are all zero."""
    embedding = nn.Embedding(512, HIDDEN)
    nn.init.zeros_(embedding.weight)
    added = EmbeddingNoise(embedding, ALPHA)
    added.prepare(dropout_keys(ids, bounds, mask, 1, 2), lengths_of_examples(ids, bounds, mask))
    found = embedding(ids).detach()
    assert not embedding(ids).any(), "only the pass that was prepared"
    return found.view(-1, HIDDEN)


def test_an_examples_noise_does_not_depend_on_its_company_or_on_padding():
    generator = torch.Generator().manual_seed(0)
    examples = [torch.randint(0, 512, (length,), generator=generator) for length in LENGTHS]
    alone = [_noise_of(example.unsqueeze(0)) for example in examples]
    bounds = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    packed = _noise_of(torch.cat(examples).unsqueeze(0), bounds).split(LENGTHS)
    mask = (torch.arange(12) < torch.tensor(LENGTHS).unsqueeze(1)).long()
    ids = torch.zeros(4, 12, dtype=torch.long)
    for row, example in zip(ids, examples, strict=True):
        row[: len(example)] = example
    padded = _noise_of(ids, mask=mask).view(4, 12, HIDDEN)
    for number, expected in enumerate(alone):
        assert torch.equal(packed[number], expected)
        assert torch.equal(padded[number, : LENGTHS[number]], expected)
        assert expected.abs().max() <= ALPHA / math.sqrt(LENGTHS[number] * HIDDEN)


def test_the_noise_is_uniform():
    """Mean and mean square of n numbers are within five standard deviations of a uniform one's."""
    keys = torch.arange(4096, dtype=torch.int32) * 977
    found = noise(keys, torch.ones(4096), 64).double()
    n = found.numel()
    assert abs(found.mean()) < 5 * math.sqrt(1 / 3 / n)
    assert abs(found.square().mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / n)
    assert abs(found[:, 0].mul(found[:, 1]).mean()) < 5 / 3 / math.sqrt(len(keys))


def _losses(run) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


@pytest.mark.parametrize(("method", "packing"), [("lora", True), ("full", False)])
def test_two_ranks_train_as_one(method, packing, tiny_base, make_run, tmp_path):
    """In other micro batches too."""
    found = {}
    for name, processes, micro_batch, alpha in (("one", 1, 4, ALPHA), ("two", 2, 1, ALPHA), ("none", 1, 4, None)):
        training = {"max_steps": 3, "learning_rate": 1e-3, "neftune_noise_alpha": alpha}
        options = {"batch": 8, "packing": packing, "max_length": 112, "training": training}
        run = make_run(tiny_base, tmp_path / name, method, processes=processes, micro_batch=micro_batch, **options)
        run_ranks(train_here, processes, run)
        found[name] = _losses(run)
    for place, key in enumerate(("loss", "grad_norm")):
        one, two = ([step[place] for step in found[name]] for name in ("one", "two"))
        assert_curve_equal_but_for_rounding(two, one, additions_to_a_step(run), of=key)
    assert max(abs(a[1] / b[1] - 1) for a, b in zip(found["one"], found["none"], strict=True)) > 1e-2
