"""Whatever the GPU's kernels demand of a batch holds on the CPU too, in every command that calls the model.

The CPU could compute without much of it, so each call of the decoder is recorded and held against the demands.
"""

from argparse import Namespace

import pytest
import torch
from ranks import run_ranks, train_here
from transformers import LlamaModel

from fitune.training.evaluate import evaluate
from fitune.training.generate import generate


def _record(calls: list[dict]) -> None:
    """From now on each call of a decoder in this process adds what it was given."""
    original = LlamaModel.forward

    def forward(self, *args, **kwargs):
        assert not args
        kept = {key: value for key, value in kwargs.items() if isinstance(value, torch.Tensor | int)}
        calls.append(kept | {"training": self.training, "cached": kwargs.get("past_key_values") is not None})
        return original(self, **kwargs)

    LlamaModel.forward = forward


def _train_and_evaluate_and_ask(run) -> dict[str, list[dict]]:
    """What the decoder is given by each command, of a run that evaluates while it trains."""
    calls: list[dict] = []
    _record(calls)
    options = {
        "prompt": ["River stone."],
        "text": [],
        "test": 1,
        "chat": False,
        "max_new_tokens": 3,
        "temperature": 0.0,
        "seed": None,
    }
    train_here(run)
    evaluated = len(calls)
    evaluate(run)
    asked = len(calls)
    generate(run, Namespace(**options, json=None, force=False))
    return {
        "train": [call for call in calls[:evaluated] if call["training"]],
        "train, evaluating": [call for call in calls[:evaluated] if not call["training"]],
        "eval": calls[evaluated:asked],
        "generate": calls[asked:],
    }


@pytest.fixture(scope="module", params=["lora", "full"])
def packed(request, make_run, tiny_base, tmp_path_factory):
    """The calls of each command over packed rows."""
    training = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    folder = tmp_path_factory.mktemp("run")
    run = make_run(tiny_base, folder, request.param, packing=True, training=training)
    return run_ranks(_train_and_evaluate_and_ask, 1, run)[0]


@pytest.mark.parametrize("command", ["train", "train, evaluating", "eval"])
def test_packed_rows_come_with_what_the_kernel_wants(packed, command):
    assert packed[command]
    for call in packed[command]:
        bounds, device = call["cu_seq_lens_q"], call["input_ids"].device
        lengths = bounds.diff()
        assert bounds.dtype == torch.int32
        assert bounds.device == call["position_ids"].device == device
        assert type(call["max_length_q"]) is int
        assert call["max_length_q"] == lengths.max()
        assert call.get("attention_mask") is None
        positions = torch.cat([torch.arange(length) for length in lengths])
        assert call["position_ids"].tolist() == [positions.tolist()], "positions start anew with each example"
        assert call["input_ids"].shape == (1, len(positions))
    assert any(len(call["cu_seq_lens_q"]) > 2 for call in packed[command]), "no row held two examples"


def test_generation_hands_over_rows_padded_on_the_left_if_at_all(packed):
    """Which sdpa takes, with a mask of its own."""
    assert packed["generate"]
    for call in packed["generate"]:
        assert call["cached"]
        assert "cu_seq_lens_q" not in call
        mask = call.get("attention_mask")
        assert mask is None or bool((mask.diff(dim=1) >= 0).all())
