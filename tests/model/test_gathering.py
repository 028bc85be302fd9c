"""What travels between ranks: weights, as bytes and ahead of time, and gradients, in bf16 or float32."""

from pathlib import Path
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from ranks import run_ranks, sharded_model, whole
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as param_group
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from transformers import LlamaForCausalLM

from fitune.errors import FituneError
from fitune.model import sharding
from fitune.model.fp8 import round_weight
from fitune.model.fp8_linear import FP8Linear
from fitune.model.nf4 import NF4Linear
from fitune.model.skeleton import decoder

TOKENS = torch.randint(0, 509, (2, 19), generator=torch.Generator().manual_seed(0))


def _gathers(run) -> dict:
    """What travels when the decoder layers of `run` are gathered, in the forward and in the backward pass."""
    gathered, copied = [], []
    gather, copy = collectives.DefaultAllGather.__call__, torch._foreach_copy_

    def record_gather(self, output_tensor, input_tensor, *args, **kwargs):
        gathered.append((output_tensor.dtype, input_tensor.dtype, input_tensor.numel()))
        return gather(self, output_tensor, input_tensor, *args, **kwargs)

    def record_copy(to, origin, *args, **kwargs):
        copied.extend((a.dtype, b.dtype) for a, b in zip(to, origin, strict=True))
        return copy(to, origin, *args, **kwargs)

    collectives.DefaultAllGather.__call__, torch._foreach_copy_ = record_gather, record_copy
    model, _ = sharded_model(run)
    layers = decoder(model).model.layers
    result = {"layers": [], "numel": [], "bytes": []}
    for layer in layers:
        result["numel"].append(
            sum(
                -(-p.shape[0] // run.accelerate.num_processes) * p.shape[1:].numel() * p.dtype.itemsize
                for p in sharding.group_parameters(layer)
            )
        )
        gathered.clear()
        copied.clear()
        layer.unshard()
        result["layers"].append((list(gathered), list(copied)))
        result["bytes"].append(
            {
                name: module.weight.detach().view(torch.uint8).view(-1).clone()
                for name, module in layer.named_modules()
                if isinstance(module, NF4Linear | FP8Linear)
            }
        )
        layer.reshard()
    gathered.clear()
    model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    result["step"] = list(gathered)
    return result


@pytest.mark.parametrize(("method", "compute"), [("qlora", "bf16"), ("lora", "fp8")])
@pytest.mark.parametrize("kept", [False, True])
def test_decoder_layers_are_gathered_as_bytes(method, compute, kept, uneven_base, make_run, tmp_path):
    """bf16 compute, as on a GPU: there a gather in bf16 or fp32 would rewrite NaN patterns among the packed weights.

    https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1945 does not show on the CPU; the dtype in which
    FSDP2 copies and sends the bytes does.
    """
    options = {"mixed_precision": "bf16", "compute": compute, "reshard_after_forward": not kept}
    run = make_run(uneven_base, tmp_path, method, processes=2, **options)
    source = LlamaForCausalLM.from_pretrained(uneven_base, dtype="auto")
    for report in run_ranks(_gathers, 2, run):
        for (gathered, copied), numel, packed, layer in zip(
            report["layers"], report["numel"], report["bytes"], source.model.layers, strict=True
        ):
            assert gathered == [(torch.uint8, torch.uint8, numel)]
            assert copied and set(copied) == {(torch.uint8, torch.uint8)}
            assert len(packed) == 7
            for name, found in packed.items():
                weight = layer.get_submodule(name.replace(".base_layer", "")).weight.detach()
                if method == "lora":
                    expected = round_weight(weight)[0].view(torch.uint8)
                else:
                    expected, _ = bnb.functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
                assert torch.equal(found[: expected.numel()], expected.view(-1)), name
        layer_gathers = [g for g in report["step"] if g[2] in report["numel"]]
        # both layers in the forward and, where they were freed, again in the backward pass, each time as bytes
        times = 1 if kept else 2
        assert layer_gathers == [(torch.uint8, torch.uint8, numel) for numel in report["numel"]] * times


def _unit_dtypes(run) -> list[set]:
    model, _ = sharded_model(run)
    sharding._check_gathered_as_bytes(model)
    return [{p.dtype for p in sharding.group_parameters(layer)} for layer in decoder(model).model.layers]


def test_uniform_dtype_group_is_refused_on_a_gpu(uneven_base, make_run, tmp_path, monkeypatch):
    """A layer of packed weights and nothing but their dtype would be gathered in that dtype."""

    def group_on(device_type, *dtypes):
        mesh = SimpleNamespace(device_type=device_type)
        return lambda unit: [SimpleNamespace(dtype=dtype, device_mesh=mesh) for dtype in dtypes]

    class Layer(torch.nn.Module, FSDPModule):
        __new__ = object.__new__

        def __init__(self):
            super().__init__()
            self.projection = NF4Linear(8, 8)

    model = torch.nn.Sequential(Layer())
    monkeypatch.setattr(sharding, "group_parameters", group_on("cuda", torch.float32, torch.float32))
    with pytest.raises(FituneError, match=r"0: all parameters are torch\.float32"):
        sharding._check_gathered_as_bytes(model)
    monkeypatch.setattr(sharding, "group_parameters", group_on("cuda", torch.float32, torch.bfloat16))
    sharding._check_gathered_as_bytes(model)
    monkeypatch.setattr(sharding, "group_parameters", group_on("cpu", torch.float32, torch.float32))
    sharding._check_gathered_as_bytes(model)  # the CPU copies floats bit for bit

    run = make_run(uneven_base, tmp_path, mixed_precision="bf16")
    for dtypes in run_ranks(_unit_dtypes, 1, run)[0]:
        assert dtypes == {torch.float32, torch.bfloat16}


def _gradients_of_own_rows(run) -> dict[str, torch.Tensor]:
    """Whole gradients, averaged over ranks that each saw another row."""
    model, _ = sharded_model(run)
    tokens = TOKENS[torch.distributed.get_rank()].unsqueeze(0)
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    return {name: whole(parameter.grad) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("reduce_dtype", ["bf16", "fp32"])
def test_gradients_are_reduced_as_the_profile_says(reduce_dtype, replicas, uneven_base, make_run, tmp_path):
    """Where layers compute in bf16: the mean of two bf16 numbers is seldom one itself. Copies know float32 alone."""
    options = {"processes": 2, "mixed_precision": "bf16", "reduce_dtype": reduce_dtype, "replicas": replicas}
    run = make_run(uneven_base, tmp_path, "full", **options)
    in_bf16 = reduce_dtype == "bf16" and replicas == 1
    for name, gradient in run_ranks(_gradients_of_own_rows, 2, run)[0].items():
        assert gradient.dtype == torch.float32, name
        if "embed_tokens" not in name:  # of one token's row most ranks have no gradient: half of a bf16 number is one
            assert bool((gradient.bfloat16().float() != gradient).any()) != in_bf16, name


def test_passes_are_added_up_in_float32_whatever_ranks_reduce_in(uneven_base, make_run, tmp_path):
    run = make_run(uneven_base, tmp_path, "full", processes=2, mixed_precision="bf16")
    for name, gradient in run_ranks(_gradients_of_two_passes, 2, run)[0].items():
        if "embed_tokens" not in name:
            assert (gradient.bfloat16().float() != gradient).any(), name


def _gradients_of_two_passes(run) -> dict[str, torch.Tensor]:
    model, _ = sharded_model(run)
    for row in TOKENS.split(1)[:2]:
        model(row, labels=row, use_cache=False).loss.backward()
    return {name: whole(parameter.grad) for name, parameter in model.named_parameters()}


def test_what_docs_say_of_adding_up_in_bf16():
    page = " ".join((Path(__file__).resolve().parents[2] / "docs" / "memory.md").read_text(encoding="utf-8").split())
    said = {2: 0.24, 4: 0.32, 16: 0.53}
    assert "0.24 for two GPUs, 0.32 for four, 0.53 for sixteen; with `fp32` 0.17 are left" in page
    torch.manual_seed(0)
    for ranks, per_cent in said.items():
        exact = torch.randn(ranks, 2**18, dtype=torch.float64)
        of_ranks, total = exact.bfloat16(), exact.sum(0)
        in_bf16, in_float32 = of_ranks[0], of_ranks.float().sum(0)
        for gradient in of_ranks[1:]:
            in_bf16 = in_bf16 + gradient
        found = [float((each.double() - total).norm() / total.norm()) * 100 for each in (in_bf16, in_float32)]
        assert found == pytest.approx([per_cent, 0.17], abs=0.01), ranks


def _forward_in_order(run) -> list[tuple[str, int]]:
    """What a forward pass does: it gathers and computes units 0, 1 …, from the embedding to the head's norm."""
    model, _ = sharded_model(run)
    units, found = [model.model.embed_tokens, *model.model.layers, model.model.norm], []
    numbers = {id(unit._get_fsdp_state()._fsdp_param_group.fsdp_params): n for n, unit in enumerate(units)}
    gather = param_group.foreach_all_gather

    def gathered(parameters, *args, **kwargs):
        found.append(("gather", numbers[id(parameters)]))
        return gather(parameters, *args, **kwargs)

    param_group.foreach_all_gather = gathered
    for number, unit in enumerate(units):
        unit.register_forward_pre_hook(lambda *_, number=number: found.append(("compute", number)))
    model(TOKENS, use_cache=False)
    return found


def test_the_next_unit_is_gathered_before_one_computes_where_they_stay(tiny_base, make_run, tmp_path):
    run = make_run(tiny_base, tmp_path, "full", processes=2, reshard_after_forward=False)
    for found in run_ranks(_forward_in_order, 2, run):
        assert len(found) == 8
        for number in range(3):
            assert found.index(("gather", number + 1)) < found.index(("compute", number))


def _left_to_run(run) -> int:
    """Modules whose forward FSDP still waits for after a pass that multiplies by the head's weight, as TRL's loss."""
    FSDPState._force_complete_incomplete_states = lambda state, output: output  # torch before 2.13 has no such
    model, _ = sharded_model(run)
    model.forward = lambda tokens: model.model(tokens).last_hidden_state @ model.lm_head.weight.T
    model(TOKENS)
    return len(model.lm_head._get_fsdp_state()._modules_to_run_forward)


def test_a_head_that_is_never_called_counts_as_run(tiny_base, make_run, tmp_path):
    """torch 2.11 warns otherwise, in every run."""
    assert run_ranks(_left_to_run, 2, make_run(tiny_base, tmp_path, "full", processes=2)) == [0, 0]
