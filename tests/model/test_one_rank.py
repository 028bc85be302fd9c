"""One rank: weights that lie on the GPU are not copied, the others are on their way before they are needed."""

import pytest
import torch
from ranks import run_alone, run_ranks, sharded_model, train_here
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as param_group
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from fitune.model.sharding import local_part
from fitune.model.skeleton import decoder
from fitune.training.trainer import ShardedSFTTrainer

TOKENS = torch.randint(0, 509, (1, 19), generator=torch.Generator().manual_seed(0))


def _group(module: FSDPModule) -> FSDPParamGroup:
    return module._get_fsdp_state()._fsdp_param_group


def _computes_with(run) -> list[tuple[str, bool, bool]]:
    """(weight, whether it is the stored one, whether its memory is freed afterwards), as each layer runs."""
    model, _ = sharded_model(run)
    stored = {name: local_part(p).untyped_storage().data_ptr() for name, p in model.named_parameters()}
    used = {}

    def look(prefix):
        return lambda layer, *_: used.update({f"{prefix}.{n}": p for n, p in layer.named_parameters()})

    for name, module in model.named_modules():
        if module in decoder(model).model.layers:
            module.register_forward_pre_hook(look(name))
    model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    same = {name: p.untyped_storage().data_ptr() == stored[name] for name, p in used.items()}
    return [(name, same[name], p.untyped_storage().nbytes() == 0) for name, p in used.items()]


def _on_their_way(run) -> dict[str, list[int]]:
    """Layers whose copies have started, but not been waited for, as each layer runs forward and backward."""
    model, _ = sharded_model(run)
    layers = decoder(model).model.layers
    found = {"embedding": [], "forward": [], "backward": []}

    def look(way):
        return lambda *_: found[way].append([i for i, one in enumerate(layers) if _group(one)._all_gather_result])

    decoder(model).model.embed_tokens.register_forward_pre_hook(look("embedding"))
    for layer in layers:
        layer.register_forward_pre_hook(look("forward"))
        # after FSDP's own hook of the output, which a backward pre-hook of the module would come before
        layer.register_forward_hook(lambda module, inputs, output: output.register_hook(look("backward")) and None)
    model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    return found


def _gathers(run) -> dict[str, int]:
    """How often the embedding is gathered in a backward pass, and whether the head's gather leaves a buffer behind."""
    model, _ = sharded_model(run)
    backbone = decoder(model).model
    loss = model(TOKENS, labels=TOKENS, use_cache=False).loss
    buffer = _group(backbone.norm).comm_ctx.all_gather_state
    unshards = []
    group = _group(backbone.embed_tokens)
    group.wait_for_unshard = lambda: unshards.append(group._all_gather_result) or FSDPParamGroup.wait_for_unshard(group)
    loss.backward()
    return {"embedding": sum(result is not None for result in unshards), "buffer": buffer is not None}


def test_stored_weights_are_used_in_place(tiny_base, make_run, tmp_path):
    for method in ("lora", "qlora", "full"):
        weights = run_alone(_computes_with, make_run(tiny_base, tmp_path, method=method))
        assert weights
        assert all(in_place and not freed for _, in_place, freed in weights), method


def test_offloaded_weights_are_copied_one_layer_ahead_and_freed(tiny_base, make_run, tmp_path):
    run = make_run(tiny_base, tmp_path, method="qlora", offload_params=True)
    assert all(freed and not in_place for _, in_place, freed in run_alone(_computes_with, run))

    assert run_alone(_on_their_way, run) == {"embedding": [[0]], "forward": [[1], []], "backward": [[0], []]}


def _stay_whole(run) -> list[list[int]]:
    """Layers that are whole after each pass of training."""
    found, step = [], ShardedSFTTrainer.training_step

    def training_step(trainer, model, *args, **kwargs):
        loss = step(trainer, model, *args, **kwargs)
        found.append([i for i, layer in enumerate(decoder(model).model.layers) if _group(layer).is_unsharded])
        return loss

    ShardedSFTTrainer.training_step = training_step
    train_here(run)
    return found


def test_the_first_layer_stays_between_the_passes_of_a_step(tiny_base, make_run, tmp_path):
    """No longer: a step changes its adapter."""
    options = {"batch": 3, "micro_batch": 1, "training": {"max_steps": 2, "learning_rate": 1e-2}}
    run = make_run(tiny_base, tmp_path, method="qlora", offload_params=True, **options)
    assert run_ranks(_stay_whole, 1, run) == [[[0], [0], []] * 2]


def _added_up(run) -> list[dict[str, torch.Tensor]]:
    """The gradients of two passes together and of each, by parameter. Fails where FSDP copies them into its buffers."""
    model, _ = sharded_model(run)
    param_group.foreach_reduce = None
    found = []
    for passes in ([TOKENS, TOKENS.flip(1)], [TOKENS], [TOKENS.flip(1)]):
        for tokens in passes:
            model(tokens, labels=tokens, use_cache=False).loss.backward()
        found.append({name: local_part(parameter.grad) for name, parameter in model.named_parameters()})
        model.zero_grad()
    return found


def test_gradients_are_added_up_where_they_lie(tiny_base, make_run, tmp_path):
    """In float32 from passes in bf16, to the bit."""
    both, first, second = run_alone(_added_up, make_run(tiny_base, tmp_path, method="full", mixed_precision="bf16"))
    assert all(gradient.dtype == torch.float32 for gradient in both.values())
    for name, gradient in both.items():
        assert first[name].any() and torch.equal(gradient, first[name] + second[name]), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_gathered_layers_of_method_full_stay_until_the_step_is_over(ranks, tiny_base, make_run, tmp_path):
    """And change no bit of what is trained."""
    weights = {}
    for freed in (True, False):
        options = {"processes": ranks, "batch": 3 * ranks, "micro_batch": 1, "mixed_precision": "bf16",
                   "training": {"max_steps": 2, "learning_rate": 1e-2}}  # fmt: skip
        run = make_run(tiny_base, tmp_path / str(freed), method="full", reshard_after_forward=freed, **options)
        whole = [] if freed else [0, 1]
        assert run_ranks(_stay_whole, ranks, run) == [[whole, whole, []] * 2] * ranks
        weights[freed] = load_file(run.result_folder / "model.safetensors")
    assert all(torch.equal(weights[False][name], weight) for name, weight in weights[True].items())


def test_the_embedding_is_not_gathered_backward_and_the_heads_buffer_is_freed(tiny_base, make_run, tmp_path):
    run = make_run(tiny_base, tmp_path, method="qlora", processes=2)
    assert run_ranks(_gathers, 2, run) == [{"embedding": 0, "buffer": False}] * 2
