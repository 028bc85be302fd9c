"""Checkpoints that are NF4 already, as transformers writes them: the same bytes on any number of ranks."""

import pytest
import torch
from bitsandbytes.functional import QuantState
from loading import CPU, load_and_count_bytes, quantised, same, state_content
from ranks import run_ranks

from fitune.weights.safetensors_files import Checkpoint


def _load_prequantised(runs: dict) -> dict:
    report = {}
    for case, run in runs.items():
        model, count = load_and_count_bytes(run)
        tokens = torch.arange(40).view(2, 20)
        report[case] = {"model": quantised(model), "bytes": count, "logits": model(tokens).logits.detach()}
    return report


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_checkpoint_in_nf4_format_gives_the_same_bytes(world_size, nf4_bases, uneven_base, make_run, tmp_path):
    runs = {case: make_run(base, tmp_path, processes=world_size) for case, base in nf4_bases.items()}
    runs["quantised while loading"] = make_run(uneven_base, tmp_path, processes=world_size)
    reports = run_ranks(_load_prequantised, world_size, runs)
    for case, base in nf4_bases.items():
        checkpoint = Checkpoint(base)
        stored = {n for n in checkpoint.tensors if n.endswith(".weight")}
        statistics = sum(info.nbytes for name, info in checkpoint.tensors.items() if name not in stored)
        packed = sum(checkpoint[name].nbytes for name in stored)
        # the few bytes that say how a tensor is packed are read once more, to be checked before memory is taken
        states = sum(info.nbytes for name, info in checkpoint.tensors.items() if "quant_state" in name)
        read = sum(report[case]["bytes"] for report in reports) - packed
        assert world_size * statistics <= read <= world_size * (statistics + states)
        for report in reports:
            assert len(report[case]["model"]) == 14
            for name, entry in report[case]["model"].items():
                assert torch.equal(entry["bytes"], checkpoint.read(name).view(torch.uint8).view(-1)), (case, name)
                parts = {
                    n.removeprefix(f"{name}."): checkpoint.read(n)
                    for n in checkpoint.tensors
                    if n.startswith(f"{name}.")
                }
                assert same(
                    {k: v for k, v in entry.items() if k != "bytes"},
                    state_content(QuantState.from_dict(parts, device=CPU)),
                ), (case, name)
            if case != "single":
                streamed = report["quantised while loading"]
                assert same(report[case]["model"], streamed["model"]), case
                # the same bytes through the same code
                assert torch.equal(report[case]["logits"], streamed["logits"]), case
    assert not torch.equal(reports[0]["single"]["logits"], reports[0]["double"]["logits"])
