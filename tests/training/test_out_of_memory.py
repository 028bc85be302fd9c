"""Out of memory on a GPU: one line with what was asked for, what the plan had said, what to change."""

import re

import pytest
import torch

from fitune.planning.fill import resolve
from fitune.planning.sizes import GIB
from fitune.training.out_of_memory import explain_out_of_memory

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
