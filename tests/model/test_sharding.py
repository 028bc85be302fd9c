"""The sharded model against the unsharded one: same parameters, same logits, and only its share on each rank."""

import json
import math

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from ranks import run_ranks, sharded_model, whole
from rounding import additions_to_gradients, additions_to_logits, assert_equal_but_for_rounding, distance
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fitune.errors import UsageError
from fitune.model import sharding
from fitune.model.sharding import local_part, shard_group, split_as
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


def test_transformers_is_told_where_a_model_computes_whose_embedding_waits_elsewhere(tiny_base):
    from transformers import LlamaConfig, LlamaForCausalLM

    from fitune.model.sharding import computes_on

    model = LlamaForCausalLM(LlamaConfig.from_pretrained(str(tiny_base)))
    computes_on(model, torch.device("meta"))
    assert model.device == torch.device("meta") and next(model.parameters()).device.type == "cpu"
    assert isinstance(model, LlamaForCausalLM) and type(model).__name__ == "LlamaForCausalLM"


def test_rows_in_host_ram_stay_there_where_the_mesh_is_one_of_gpus():
    """No GPU is needed to see it: torch's own `from_local` fails here, as it looks for one."""
    mesh = DeviceMesh("cuda", torch.tensor([0]), _init_backend=False, _rank=0)
    spec = DTensorSpec(mesh, (Shard(0),), tensor_meta=TensorMeta(torch.Size([4, 3]), (3, 1), torch.bfloat16))
    weight = DTensor(torch.zeros(4, 3, dtype=torch.bfloat16), spec, requires_grad=False)
    rows = torch.arange(12.0).view(4, 3)
    split = split_as(weight, rows)
    assert split.to_local().data_ptr() == rows.data_ptr() and split.dtype == torch.float32
    assert (split.shape, split.placements, split.device_mesh) == (weight.shape, weight.placements, mesh)
    assert split_as(rows, rows) is rows
