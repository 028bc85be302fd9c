"""Optimizer states in host RAM on a GPU: streams and slots change no bit, however far the CPU runs ahead."""

import pytest
import torch

from fitune.model.host_ram import pin_in_place
from fitune.optimizers import host_states
from fitune.optimizers.adamw_8bit import AdamW8bit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]


@pytest.mark.parametrize("piece", [2**18, 2**24])
def test_states_in_host_ram_change_no_bit_on_a_gpu(piece, monkeypatch):
    """Layers enough to go round the ring several times, three passes a step, gradients freed and taken again."""
    monkeypatch.setattr(host_states, "PIECE", piece)
    monkeypatch.setattr(host_states, "IN_FLIGHT_BYTES", 2**22)
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, device="cuda").bfloat16()

    start = [random(2048, 1024) * 0.02 if n % 2 else random(1024, 2048) * 0.02 for n in range(24)]
    norm_weight = torch.ones(1024, device="cuda", dtype=torch.bfloat16)
    inputs = [random(512, 1024) for _ in range(3)]
    found = {}
    for offload in (False, True):
        weights = [torch.nn.Parameter(value.clone()) for value in start]
        vector = torch.nn.Parameter(norm_weight.clone())
        optimizer, norms = AdamW8bit([*weights, vector], lr=1e-2, seed=1, offload=offload), []
        for _ in range(3):
            for x in inputs:
                for up, down in zip(weights[1::2], weights[0::2], strict=True):
                    x = torch.nn.functional.rms_norm(x + (x @ up.t()).relu() @ down.t(), (1024,), vector)
                x.float().square().mean().backward()
            norms.append(optimizer.clip(1.0))
            optimizer.step()
            for parameter in (*weights, vector):
                parameter.grad = None
        if offload:
            assert all(value.is_pinned() for key, value in optimizer.state[weights[0]].items() if key != "step")
        found[offload] = [
            *norms,
            *weights,
            vector,
            *(
                optimizer.state[w][k].cpu()
                for w in weights
                for k in ("exp_avg", "exp_avg_scale", "exp_avg_sq_root", "exp_avg_sq_root_scale")
            ),
        ]
    different = [n for n, pair in enumerate(zip(found[False], found[True], strict=True)) if not torch.equal(*pair)]
    assert not different


def test_memory_that_was_page_locked_can_be_used_again():
    """Malloc gives the same addresses out again, cut in another way: CUDA refuses a copy from memory locked in part."""
    for size in (3 * 2**20, 5 * 2**20, 3 * 2**20):
        tensor = torch.zeros(size, dtype=torch.uint8)
        pin_in_place(tensor)
        assert tensor.is_pinned()
        del tensor
    for size in (2**20, 4 * 2**20, 8 * 2**20):
        again = torch.ones(size, dtype=torch.uint8)
        assert not again.is_pinned()
        assert again.cuda().sum().item() == size
