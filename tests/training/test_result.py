"""What training leaves behind, before it has changed anything: the base itself."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks, sharded_model, train_here
from transformers import AutoConfig

from fitune.config.adapter_folder import ADAPTER_WEIGHTS
from fitune.errors import FituneError
from fitune.export.adapter import AdapterFile
from fitune.model.sharding import share_of
from fitune.training import train
from fitune.training.result import save_result
from fitune.training.result_check import check_result
from fitune.weights.base_identity import BaseRecord
from fitune.weights.safetensors_files import Checkpoint, CheckpointWriter


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


def _saved_beyond_a_shards_size(run) -> None:
    split = CheckpointWriter._split
    CheckpointWriter._split = staticmethod(lambda specs, _: split(specs, 1000))
    model, tokenizer = sharded_model(run)
    save_result(run.result_folder, run, model, tokenizer, BaseRecord("tiny/base", None, {}))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_adapter_of_any_size_is_one_file(method, tiny_base, make_run, tmp_path):
    """PEFT reads one. A model is split: beyond 5 GB, which LoRA of rank 128 on 70B is, too."""
    run = make_run(tiny_base, Path(tmp_path), method)
    run_ranks(_saved_beyond_a_shards_size, 1, run)
    files = [file.name for file in run.result_folder.glob("*.safetensors")]
    assert len(files) > 1 if method == "full" else files == [ADAPTER_WEIGHTS]
    reader = Checkpoint if method == "full" else AdapterFile
    with reader(run.result_folder) as written:
        assert all(written.read(name).isfinite().all() for name in written.tensors)


def _checked(run) -> str | None:
    """What each rank says of the result when one bit of its last number was turned; before that none may complain."""
    model, tokenizer = sharded_model(run)
    save_result(run.result_folder, run, model, tokenizer, BaseRecord("tiny/base", None, {}))
    dist.barrier()
    check = run.result_folder, run, model, share_of(run, dist.get_rank())
    check_result(*check)
    dist.barrier()
    if dist.get_rank() == 0:
        [file] = run.result_folder.glob("*.safetensors")
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    dist.barrier()
    try:
        check_result(*check)
    except FituneError as error:
        return str(error)
    return None


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("processes", [1, 3])
def test_a_result_that_is_not_what_was_trained_is_told(method, processes, uneven_base, make_run, tmp_path):
    run = make_run(uneven_base, Path(tmp_path), method, processes=processes)
    said = [error for error in run_ranks(_checked, processes, run) if error]
    assert len(said) == 1, "a rank holds other rows, or nobody noticed"
    assert said[0].startswith(f"{run.result_folder}: rows ") and "are not as they were trained" in said[0]


def _told_by_the_last_rank(run) -> None:
    def check(*_):
        if dist.get_rank() == 1:
            raise FituneError("not as it was trained")

    train.check_result = check
    train_here(run)


def test_a_run_whose_result_one_rank_refuses_is_not_finished(tiny_base, make_run, tmp_path):
    run = make_run(tiny_base, Path(tmp_path) / "run", "lora", processes=2, training={"max_steps": 1})
    with pytest.raises(RuntimeError, match="not as it was trained"):
        run_ranks(_told_by_the_last_rank, 2, run)
    assert run.result_folder.is_dir() and not (run.folder / "finished.json").exists()
