"""Where ranks' shares differ, FSDP leaves what was loaded where it is, values and all."""

import pytest
import torch
from ranks import run_ranks, sharded_model
from rounding import additions_to_logits, assert_equal_but_for_rounding
from transformers import LlamaConfig

from fitune.model.sharding import local_part
from fitune.weights import load as weights


def _before_and_after_a_forward(run) -> dict:
    weights.PIN_FROM_BYTES = 1
    model, _ = sharded_model(run)
    before = {name: share for name, share in _shares(model).items() if share[1].numel()}
    logits = model(torch.arange(40).view(2, 20)).logits.detach()
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    after = _shares(model)
    moved = [name for name, (place, _) in before.items() if after[name][0] != place]
    changed = [name for name, (_, content) in before.items() if not torch.equal(after[name][1], content)]
    return {"shares": len(before), "moved": moved, "changed": changed, "logits": logits}


def _shares(model) -> dict[str, tuple[int, torch.Tensor]]:
    """Where each parameter's share lies, and its bytes."""
    shares = {name: local_part(parameter).detach() for name, parameter in model.named_parameters()}
    return {name: (share.data_ptr(), share.view(torch.uint8).clone()) for name, share in shares.items()}


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("method", ["qlora", "full"])
def test_a_short_share_is_padded_before_it_is_filled(method, offload, uneven_base, make_run, tmp_path):
    def loaded(processes: int) -> list[dict]:
        run = make_run(uneven_base, tmp_path, method, processes=processes, offload_params=offload)
        return run_ranks(_before_and_after_a_forward, processes, run)

    [alone], ranks = loaded(1), loaded(3)
    additions = additions_to_logits(LlamaConfig.from_pretrained(uneven_base), length=20)
    for rank in ranks:
        assert rank["shares"] > 10
        assert rank["moved"] == rank["changed"] == []
        assert_equal_but_for_rounding(rank["logits"], alone["logits"], additions)
