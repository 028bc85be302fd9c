"""What training leaves behind, before it has changed anything: the base itself."""

from pathlib import Path

import pytest
import torch
from ranks import run_ranks, sharded_model
from transformers import AutoConfig

from fitune.training.result import save_result
from fitune.weights.safetensors_files import Checkpoint


def _saved(run) -> None:
    model, tokenizer = sharded_model(run)
    save_result(run.result_folder, run, model, tokenizer, None)


@pytest.mark.parametrize("processes", [1, 3])
def test_a_whole_model_is_saved_in_the_bases_dtype_bit_for_bit(processes, uneven_base, make_run, tmp_path):
    """It trains in float32, and a bf16 base comes back in bf16."""
    run = make_run(uneven_base, Path(tmp_path), "full", processes=processes)
    run_ranks(_saved, processes, run)
    with Checkpoint(uneven_base) as base, Checkpoint(run.result_folder) as saved:
        assert set(saved.tensors) == set(base.tensors)
        for name, info in base.tensors.items():
            assert saved[name].dtype == info.dtype == torch.bfloat16, name
            assert torch.equal(saved.read(name), base.read(name)), name
    assert AutoConfig.from_pretrained(run.result_folder).dtype == torch.bfloat16
