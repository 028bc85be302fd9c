"""The sharded model against the unsharded one: same parameters, same logits, and only its share on each rank."""

import json
import math
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from ranks import run_ranks, sharded_model, whole
from rounding import additions_to_gradients, additions_to_logits, assert_equal_but_for_rounding, distance
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fitune.errors import FituneError, UsageError
from fitune.model import sharding
from fitune.model.fp8 import round_weight
from fitune.model.fp8_linear import FP8Linear
from fitune.model.nf4 import NF4Linear
from fitune.model.sharding import local_part, shard_group
from fitune.model.skeleton import build_skeleton, decoder
from fitune.training.loss import add_answer_loss, find_answers
from fitune.training.result import as_on_disk, gather_rows
from fitune.weights.safetensors_files import TensorSpec

TOKENS = torch.randint(0, 509, (2, 19), generator=torch.Generator().manual_seed(0))
CASES = {
    "full": {"method": "full"},
    "full, kept after forward": {"method": "full", "reshard_after_forward": False},
    "lora": {"method": "lora"},
    "qlora": {"method": "qlora"},
    "qlora, offloaded": {"method": "qlora", "offload_params": True},
    "qlora, embedding offloaded": {"method": "qlora", "embedding_offload": True},
    "qlora, bf16": {"method": "qlora", "mixed_precision": "bf16"},
    "qlora, kept after forward": {"method": "qlora", "reshard_after_forward": False},
}


def _share(parameter: DTensor) -> tuple:
    local = local_part(parameter)
    return tuple(parameter.shape), parameter.dtype, tuple(local.shape), local.untyped_storage().nbytes()


def _randomise_lora_b(model) -> None:
    """B starts at zero, which would hide the whole adapter from the logits."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            if isinstance(parameter, DTensor):
                values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
            parameter.data.copy_(values)


def _is_saved_whole(parameter: DTensor) -> bool | None:
    gathered, expected = whole(parameter), []
    for dtype in {parameter.dtype, torch.bfloat16 if parameter.is_floating_point() else torch.uint8}:
        spec = TensorSpec("weight", dtype, tuple(parameter.shape))
        saved = gather_rows(as_on_disk(parameter, spec), parameter.shape[0], shard_group(parameter))
        if saved is not None:
            expected.append(torch.equal(saved.view(torch.uint8), as_on_disk(gathered, spec).view(torch.uint8)))
    return all(expected) if expected else None


def _report(runs: dict) -> dict:
    report = {}
    for case, run in runs.items():
        model, _ = sharded_model(run)
        _randomise_lora_b(model)
        parameters = dict(model.named_parameters())
        found = report[case] = {"not sharded": [n for n, p in parameters.items() if not isinstance(p, DTensor)]}
        found["shares"] = {name: _share(parameter) for name, parameter in parameters.items()}
        found["units"] = [type(module).__name__ for module in model.modules() if isinstance(module, FSDPModule)]
        output = model(TOKENS, labels=TOKENS, use_cache=False)
        output.loss.backward()
        found["logits"] = output.logits.detach()
        found["shares after a step"] = {name: _share(parameter) for name, parameter in model.named_parameters()}
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        found["gradients"] = {n: whole(p.grad) for n, p in trainable.items()}
        found["saved"] = {name: _is_saved_whole(parameter) for name, parameter in model.named_parameters()}
        found["trainable"] = {n: whole(p).detach() for n, p in trainable.items()}
    return report


def _reference(base, method: str, dtype: torch.dtype, trainable: dict):
    """Plain transformers and PEFT on the same weights, unsharded; for QLoRA on what bitsandbytes makes of them."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=dtype)
    if method == "full":
        return model
    if method == "qlora":
        _round_to_nf4(model, LlamaForCausalLM.from_pretrained(base, dtype="auto"))
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    adapter = {name.replace(".default", ""): value for name, value in trainable.items()}
    assert set(adapter) == set(get_peft_model_state_dict(model))
    set_peft_model_state_dict(model, adapter)
    return model


def _round_to_nf4(model, source) -> None:
    """Every linear of the layers to the values that its NF4 bytes stand for.

    Not bitsandbytes' own Linear4bit: its kernels round what they are given, each in its way on another CPU.
    """
    for layer, source_layer in zip(model.model.layers, source.model.layers, strict=True):
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                packed, state = bnb.functional.quantize_4bit(
                    source_layer.get_submodule(name).weight.detach(), compress_statistics=True, quant_type="nf4"
                )
                state.dtype = module.weight.dtype
                module.weight.data.copy_(bnb.functional.dequantize_4bit(packed, state))


def _logits_and_gradients(model) -> dict[str, torch.Tensor]:
    """Logits, and the gradients of one step on `TOKENS`."""
    output = model(TOKENS, labels=TOKENS, use_cache=False)
    output.loss.backward()
    return {"logits": output.logits.detach()} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def _assert_share(found: dict, names: set[str], rank: int, world_size: int, case: str) -> None:
    for when in ("shares", "shares after a step"):
        assert set(found[when]) == names
        for name, (shape, stored, local, nbytes) in found[when].items():
            rows = torch.empty(shape[0]).chunk(world_size)
            expected = rows[rank].numel() if rank < len(rows) else 0
            assert local == (expected, *shape[1:]), (case, when, name)
            chunk_bytes = -(-shape[0] // world_size) * math.prod(shape[1:]) * stored.itemsize
            assert nbytes <= chunk_bytes, f"{case}, {when}: {name} keeps more than its share in memory"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_rank_holds_its_share_and_the_logits_are_the_unsharded_models(
    world_size, uneven_base, make_run, tmp_path
):
    runs = {case: make_run(uneven_base, tmp_path, processes=world_size, **options) for case, options in CASES.items()}
    reports = run_ranks(_report, world_size, runs)

    for case, run in runs.items():
        dtype = torch.bfloat16 if run.accelerate.mixed_precision == "bf16" else torch.float32
        first, method = reports[0][case], run.recipe.method
        expected = _logits_and_gradients(_reference(uneven_base, method, dtype, first["trainable"]))
        # One rank with nothing offloaded and nothing to cast has its parameters as they are.
        whole_on_one = world_size == 1 and case in ("lora", "qlora", "qlora, bf16", "qlora, kept after forward")
        # two layers, the embedding, norm and head, the root
        assert len(first["units"]) == (0 if whole_on_one else 6), case

        for rank, report in enumerate(reports):
            found = report[case]
            assert set(found["not sharded"]) == (set(first["shares"]) if whole_on_one else set()), case
            _assert_share(found, set(first["shares"]), rank, world_size, case)
            # what a save gathers, on the main process only
            assert set(found["saved"].values()) == ({True} if rank == 0 else {None}), case
            assert torch.equal(found["logits"], first["logits"]), case

        assert {weight.dtype for weight in first["trainable"].values()} == {torch.float32}, f"{case}: for the optimizer"
        found = {"logits": first["logits"]} | first["gradients"]
        assert set(found) == set(expected) and len(found) > 1
        config = LlamaConfig.from_pretrained(uneven_base)
        to_logits = additions_to_logits(config, TOKENS.shape[1])
        to_gradients = additions_to_gradients(config, TOKENS.shape[1], TOKENS.numel())
        if dtype == torch.bfloat16:
            exact = _logits_and_gradients(_reference(uneven_base, method, torch.float32, first["trainable"]))
        for name, value in expected.items():
            # Every rank computes the same batch, so their mean is the gradient, but for the rounding of the mean.
            if dtype == torch.float32:
                additions = to_logits if name == "logits" else to_gradients
                assert_equal_but_for_rounding(found[name], value, additions, of=(case, name))
            else:  # errors of bfloat16 are no larger than when transformers and PEFT compute, chance set aside
                assert distance(found[name], exact[name]) < 2 * distance(value, exact[name]), (case, name)


def _sums(run) -> dict:
    """Over the answers, as training makes them."""
    model, _ = sharded_model(run)
    add_answer_loss(decoder(model))
    sums = model(TOKENS, answers=find_answers(TOKENS), use_cache=False)
    return {"loss": sums.loss.detach(), "entropy": sums.entropy}


@pytest.mark.parametrize("optimizer_state", ["fp32", "bf16_8bit"])
def test_a_full_runs_loss_is_not_rounded_to_what_it_computes_in(optimizer_state, uneven_base, make_run, tmp_path):
    """FSDP casts what a unit returns if it is told a dtype. Compared with the loss by token from the logits."""
    options = {"mixed_precision": "bf16", "optimizer_state": optimizer_state}
    run = make_run(uneven_base, tmp_path, "full", processes=2, **options)
    model = LlamaForCausalLM.from_pretrained(uneven_base, dtype=torch.bfloat16)
    logits = model(TOKENS).logits[:, :-1].double()
    exact = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum"))
    for found in run_ranks(_sums, 2, run):
        assert {found[key].dtype for key in ("loss", "entropy")} == {torch.float32}
        assert float(found["loss"]) == pytest.approx(exact, rel=5e-4), "bf16 rounds by up to 2e-3"


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


def test_qlora_refuses_rows_that_are_not_whole_blocks(uneven_base, make_run, tmp_path):
    config = json.loads((uneven_base / "config.json").read_text()) | {"intermediate_size": 347}
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipes = {method: make_run(tmp_path, tmp_path, method).recipe for method in ("lora", "qlora")}
    tokenizer = AutoTokenizer.from_pretrained(uneven_base)
    build_skeleton(recipes["lora"], tmp_path, tokenizer, torch.float32, "cpu")
    with pytest.raises(UsageError, match="intermediate_size 347 is no multiple of 64, which method qlora needs"):
        build_skeleton(recipes["qlora"], tmp_path, tokenizer, torch.float32, "cpu")


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_local_rows_are_those_of_torch_chunk(world_size):
    for total in range(1, 40):
        chunks = [list(chunk) for chunk in torch.arange(total).chunk(world_size)]
        chunks += [[]] * (world_size - len(chunks))
        rows = [sharding.local_rows(total, rank, world_size) for rank in range(world_size)]
        assert [list(range(*pair)) for pair in rows] == chunks


def _gradients_of_own_rows(run) -> dict[str, torch.Tensor]:
    """Whole gradients, averaged over ranks that each saw another row."""
    model, _ = sharded_model(run)
    tokens = TOKENS[torch.distributed.get_rank()].unsqueeze(0)
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    return {name: whole(parameter.grad) for name, parameter in model.named_parameters()}


def test_gradients_are_reduced_in_float32(uneven_base, make_run, tmp_path):
    """Where layers compute in bf16: the mean of two bf16 numbers is seldom one itself."""
    run = make_run(uneven_base, tmp_path, "full", processes=2, mixed_precision="bf16")
    for name, gradient in run_ranks(_gradients_of_own_rows, 2, run)[0].items():
        assert gradient.dtype == torch.float32, name
        if "embed_tokens" not in name:  # of one token's row most ranks have no gradient: half of a bf16 number is one
            assert (gradient.bfloat16().float() != gradient).any(), name


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


def test_transformers_is_told_where_a_model_computes_whose_embedding_waits_elsewhere(tiny_base):
    from transformers import LlamaConfig, LlamaForCausalLM

    from fitune.model.sharding import computes_on

    model = LlamaForCausalLM(LlamaConfig.from_pretrained(str(tiny_base)))
    computes_on(model, torch.device("meta"))
    assert model.device == torch.device("meta") and next(model.parameters()).device.type == "cpu"
    assert isinstance(model, LlamaForCausalLM) and type(model).__name__ == "LlamaForCausalLM"
