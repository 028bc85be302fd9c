"""What a rank's memory grows by while it loads: its share, and what is on its way."""

import ctypes

import pytest
from ranks import memory_mib, run_ranks, sharded_model

from fitune.weights import load as weights
from fitune.weights import streaming

MIB = 2**20
M_MMAP_THRESHOLD = -3  # of malloc.h


def _growth(warm_up, run) -> float:
    """MiB that loading `run` adds at its peak to what this rank holds after loading another."""
    streaming.CHUNK_BYTES = weights.CHUNK_BYTES = MIB
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MIB // 16)  # what is freed goes back at once, as chunks of 64 MiB do
    sharded_model(warm_up)
    before = memory_mib("VmRSS", forget_peak=True)
    sharded_model(run)
    return memory_mib("VmHWM") - before


@pytest.mark.parametrize("compute", ["bf16", "fp8"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_no_rank_holds_more_than_its_share_and_a_layer(
    world_size, compute, larger_base, uneven_base, make_run, tmp_path
):
    options = {"processes": world_size, "compute": compute}
    warm_up, run = (make_run(base, tmp_path, "lora", **options) for base in (uneven_base, larger_base))
    layer = 2 * 1024 * 1024 + 2 * 1024 * 1024 // 2 + 3 * 1024 * 4096  # two heads share each key and value
    weight = 1 if compute == "fp8" else 4  # in float32, what the checkpoint has in bfloat16
    share = 4 * layer * weight / world_size / MIB
    for growth in run_ranks(_growth, world_size, warm_up, run):
        assert 0.9 * share < growth < share + layer * 2 / MIB, growth
