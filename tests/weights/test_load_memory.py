"""What a rank's memory grows by while it loads: its share, and what is on its way."""

from pathlib import Path

import pytest
from ranks import run_ranks, sharded_model

from fitune import streaming, weights
from fitune.tiny import build_tiny_base

MIB = 2**20
LAYERS, HIDDEN, INNER = 4, 1024, 4096
WEIGHTS = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2 + 3 * HIDDEN * INNER)
"Of all layers' linears; two heads share each key and value."


@pytest.fixture(scope="module")
def larger_base(tmp_path_factory):
    """62 M parameters in bfloat16, which LoRA on the CPU keeps in float32."""
    return build_tiny_base(
        tmp_path_factory.mktemp("larger") / "base", texts=["a text"], vocab_size=300, hidden_size=HIDDEN,
        intermediate_size=INNER, num_layers=LAYERS, num_heads=8, num_kv_heads=4,
    )  # fmt: skip


def _growth(warm_up, run) -> float:
    """MiB that loading `run` adds at its peak to what this rank holds after loading another."""
    streaming.CHUNK_BYTES = weights.CHUNK_BYTES = MIB
    sharded_model(warm_up)
    before = _status("VmRSS")
    sharded_model(run)
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    """In KiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


@pytest.mark.parametrize("world_size", [1, 2])
def test_no_rank_holds_more_than_its_share_and_a_layer(world_size, larger_base, uneven_base, make_run, tmp_path):
    warm_up, run = (make_run(base, tmp_path, "lora", processes=world_size) for base in (uneven_base, larger_base))
    share, layer = WEIGHTS * 4 / world_size / MIB, WEIGHTS * 2 / LAYERS / MIB
    for growth in run_ranks(_growth, world_size, warm_up, run):
        assert 0.9 * share < growth < share + layer, growth
