"""An embedding in host RAM on a GPU: its rows, and what is page-locked for them."""

import pytest
import torch

from fitune.model.host_embedding import HostEmbedding

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]


def test_only_rows_that_python_does_not_wait_for_are_page_locked():
    embedding = HostEmbedding.from_pretrained(torch.randn(512, 1024).bfloat16())
    ids = torch.randint(0, 512, (3, 5000), generator=torch.Generator().manual_seed(0))
    expected, rows_bytes = embedding.weight[ids], ids.numel() * 1024 * 2
    torch.cuda.reset_peak_host_memory_stats()
    before = torch.cuda.host_memory_stats()["allocated_bytes.peak"]
    assert torch.equal(embedding(ids.cuda()).cpu(), expected)
    assert torch.cuda.host_memory_stats()["allocated_bytes.peak"] - before < rows_bytes / 100
    embedding.expect(ids)
    assert torch.equal(embedding(ids.cuda()).cpu(), expected)
    assert torch.cuda.host_memory_stats()["allocated_bytes.peak"] - before >= rows_bytes
