"""Memory that is page-locked where it is."""

from types import SimpleNamespace

import pytest
import torch

from fitune.errors import FituneError
from fitune.model.host_ram import pin_in_place


def test_memory_is_page_locked_as_long_as_its_storage_lives(monkeypatch):
    locked = {}
    cudart = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: locked.update({address: size}) or 0, cudaHostUnregister=locked.pop
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    tensor = torch.zeros(2**20, dtype=torch.uint8)
    pin_in_place(tensor)
    part = torch.nn.Parameter(tensor, requires_grad=False)[10:]
    assert locked == {tensor.data_ptr(): 2**20}
    del tensor
    assert locked
    del part
    assert not locked


def test_memory_that_cannot_be_page_locked_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=lambda *_: 2))
    with pytest.raises(FituneError, match=r"page-locking 0\.50 GiB of host RAM failed \(CUDA's error 2\): free RAM"):
        pin_in_place(torch.empty(2**29, dtype=torch.uint8))
