"""Out of memory on a GPU: one line with what was asked for, what the plan had said, what to change."""

import re

import pytest
import torch

from fitune.config import run as runs
from fitune.errors import is_out_of_memory
from fitune.planning.fill import resolve
from fitune.planning.sizes import GIB
from fitune.training.out_of_memory import (
    explain_in_eval,
    explain_in_generate,
    explain_in_one_process,
    explain_out_of_memory,
)

TORCHS_WORDS = "CUDA out of memory. Tried to allocate 1.96 GiB. GPU 0 has a total capacity of 23.53 GiB of which ..."


@pytest.mark.parametrize(("held_gib", "compared"), [(25.0, r"\+\d+\.\d GiB to"), (4.0, r"within \d+\.\d GiB of")])
def test_the_message_names_size_plan_and_setting(held_gib, compared, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held_gib * GIB)
    run = resolve(
        "llama3_70b_qlora", "fsdp_offload_1x24gb", ("profile.micro_batch=2", "profile.kept_layers=0"), str(tmp_path)
    )
    message = str(explain_out_of_memory(run, 3, torch.OutOfMemoryError(TORCHS_WORDS)))
    assert message.startswith(f"rank 3: GPU memory ran out asking for 1.96 GiB with {held_gib:.1f} GiB allocated, ")
    assert re.search(rf"{compared} the \d+\.\d that `plan` says; try --set profile\.micro_batch=1", message)


def test_an_unexpected_wording_is_no_second_error(tmp_path):
    run = resolve("llama3_8b_qlora", "single_gpu", (), str(tmp_path))
    message = str(explain_out_of_memory(run, 0, torch.OutOfMemoryError("no memory")))
    assert "rank 0: GPU memory ran out asking for more" in message


@pytest.fixture
def error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 4 * GIB)
    return torch.OutOfMemoryError(TORCHS_WORDS)


SAME_WORDS = "GPU memory ran out asking for 1.96 GiB with 4.0 GiB allocated"


@pytest.mark.parametrize(
    ("rows", "said"),
    [(8, "; try micro_batch: 4 under profile: in {file}, or end"), (1, "; take GPUs with more memory")],
)
def test_eval_has_the_same_words_and_a_setting_of_its_own(rows, said, error, tmp_path):
    run = resolve("llama3_8b_qlora", "single_gpu", (f"profile.micro_batch={rows}",), str(tmp_path))
    assert f"rank 0: {SAME_WORDS}{said.format(file=tmp_path / 'run.yaml')}" in str(explain_in_eval(run, 0, error))


def test_so_have_generate_and_what_uses_one_gpu(error, tmp_path):
    run = resolve("llama3_8b_qlora", "single_gpu", (), str(tmp_path))
    assert f"rank 1: {SAME_WORDS}; ask for less with --max-new-tokens" in str(explain_in_generate(run, 1, error))
    assert f"{SAME_WORDS}; do without it, more slowly, with CUDA_VISIBLE_DEVICES=" in str(explain_in_one_process(error))


def test_host_ram_is_told_from_a_gpus(tmp_path):
    run = resolve("tiny_qlora", "cpu_2proc", (), str(tmp_path))
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3221225472 bytes. Error 12")
    for explain in (explain_out_of_memory, explain_in_eval, explain_in_generate):
        assert "rank 0: host RAM ran out asking for 3.00 GiB; " in str(explain(run, 0, error))


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error, NCCL version 2.27.5\n"
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_so_is_memory_that_cuda_and_its_libraries_get_beside_torch(words, error):
    """As where another process holds the GPU: not even the context finds room."""
    assert is_out_of_memory(RuntimeError(words))
    said = str(explain_in_one_process(RuntimeError(words)))
    assert said.startswith("GPU memory ran out asking for more with 4.0 GiB allocated; do without it")


def test_other_errors_of_cuda_are_not_about_memory():
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(ValueError("a CUDA GPU that is out of memory"))


@pytest.mark.parametrize("name", ["train", "evaluate", "generate"])
def test_it_is_one_line_in_every_stage(name, error, tmp_path, monkeypatch, capsys):
    from importlib import import_module

    module = import_module(f"fitune.training.{name}")
    run = resolve("llama3_8b_qlora", "single_gpu", (), str(tmp_path))
    (tmp_path / "run.yaml").write_text(runs.dump(run), encoding="utf-8")

    def stage(*_):
        raise error

    monkeypatch.setattr(module, name, stage)
    with pytest.raises(SystemExit) as caught:
        module.main([str(tmp_path)])
    assert caught.value.code == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: rank 0: {SAME_WORDS}")
