"""What recomputed layers keep, and where: the same training to the bit."""

import json

import pytest
import torch
from ranks import run_ranks, train_here
from safetensors.torch import load_file

from fitune.model.host_inputs import HostInputs

TRAINING = {"max_steps": 3, "learning_rate": 5e-3, "eval_strategy": "steps", "eval_steps": 2}
OPTIONS = {"packing": True, "max_length": 112, "training": TRAINING, "batch": 8}
WAYS = {
    "inputs": {},
    "inputs in RAM": {"activation_offload": True},
    "one layer kept, attention in RAM": {"kept_layers": 1, "kept_attention": True, "activation_offload": True},
}


def _train_counted(run) -> int:
    """How often something left for host RAM."""
    count, offload = [0], HostInputs.offload

    def counted(self, tensors, *waiting):
        count[0] += 1
        return offload(self, tensors, *waiting)

    HostInputs.offload = counted
    train_here(run)
    return count[0]


@pytest.mark.parametrize(
    ("method", "options"),
    [("qlora", {"processes": 2}), ("lora", {"lora": {"dropout": 0.2}}), ("full", {"processes": 2})],
    ids=str,
)
def test_the_same_training_to_the_bit(method, options, tiny_base, make_run, tmp_path):
    runs = {}
    for name, changes in WAYS.items():
        if method == "full" and "kept_attention" in changes:
            continue
        run = make_run(tiny_base, tmp_path / name, method, **OPTIONS, **options)
        runs[name] = run.model_copy(update={"profile": run.profile.model_copy(update=changes)})
    ranks = options.get("processes", 1)
    left = {name: run_ranks(_train_counted, ranks, run) for name, run in runs.items()}
    for name, counts in left.items():
        assert all(counts) if "in RAM" in name else not any(counts), left
    expected, *others = (_results(run) for run in runs.values())
    for found in others:
        assert found[0] == expected[0]
        assert all(torch.equal(tensor, expected[1][name]) for name, tensor in found[1].items())


def _results(run) -> tuple[list[dict], dict[str, torch.Tensor]]:
    lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    logged = [{key: line[key] for key in ("loss", "grad_norm", "eval_loss") if key in line} for line in lines]
    [file] = run.result_folder.glob("*model*.safetensors")
    return logged, load_file(file)
