"""profile.replicas: copies of the model, each sharded over some ranks or whole on one. Losses are those of one rank."""

import json
import shutil
import time
import weakref

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks, sharded_model, train_here
from rounding import additions_to_a_step, assert_curve_equal_but_for_rounding
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as param_group
from torch.distributed.tensor import DTensor, Replicate, Shard

from fitune.errors import FituneError
from fitune.model.nf4 import NF4Linear
from fitune.model.sharding import Share, local_part, local_rows, share_of
from fitune.optimizers import gradient_norm
from fitune.planning.plan import setup_of
from fitune.training import replicas, train, trainer
from fitune.training.evaluate import evaluate
from fitune.training.replicas import average_gradients, refuse_replicas_apart

STEPS = 3
TRAINING = {
    "max_steps": STEPS, "learning_rate": 5e-3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": STEPS,
    "max_grad_norm": 0.5, "weight_decay": 0.1,
}  # fmt: skip
OPTIONS = {"batch": 10, "packing": True, "max_length": 112, "training": TRAINING}
"Ten rows are three passes of four ranks, two places filled up."
SMALL = {"optimizer_state": "bf16_8bit", "training": TRAINING | {"learning_rate": 1e-3}}
TWO_BY_TWO = {"processes": 4, "machines": 2, "replicas": 2}
CASES = {
    "lora": ("lora", {"lora": {"dropout": 0.2}}),
    "qlora": ("qlora", {}),
    "qlora, weights in RAM": ("qlora", {"offload_params": True}),
    "qlora, embedding in RAM": ("qlora", {"embedding_offload": True}),
    "full": ("full", {}),
    "full, weights in RAM": ("full", {"offload_params": True}),
    "full, small states": ("full", SMALL),
    "full, small states in RAM": ("full", SMALL | {"optimizer_offload": True}),
}


def _curve(run, key: str = "loss") -> list[float]:
    lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if "loss" in line]


def _assert_same_losses(run, one, small_states: bool) -> None:
    found, expected = _curve(run), _curve(one)
    assert len(found) == STEPS
    if small_states:  # weights and gradients are bf16 numbers, whose last bit may differ: see test_small_states
        for step, (value, wanted) in enumerate(zip(found, expected, strict=True), 1):
            assert abs(value - wanted) <= step * torch.finfo(torch.bfloat16).eps / 8 * wanted, f"step {step}"
        return
    assert_curve_equal_but_for_rounding(found, expected, additions_to_a_step(one))
    norms = _curve(run, "grad_norm"), _curve(one, "grad_norm")
    assert_curve_equal_but_for_rounding(*norms, additions_to_a_step(one), of="grad_norm")


def _as_if_killed(run, step: int, folder, resumed_as):
    """`resumed_as` in a copy of the finished `run` that has its checkpoint of `step` only."""
    shutil.copytree(run.folder, folder)
    shutil.rmtree(folder / run.result_folder.name)
    for checkpoint in (folder / "checkpoints").glob("checkpoint-*"):
        if checkpoint.name != f"checkpoint-{step}":
            shutil.rmtree(checkpoint)
    return resumed_as.model_copy(update={"output_dir": str(folder), "resume": True})


@pytest.mark.parametrize("case", CASES)
def test_two_copies_of_two_ranks_train_as_one_rank_and_go_on_anywhere(case, uneven_base, make_run, tmp_path):
    method, extra = CASES[case]
    options = OPTIONS | extra

    def run_in(name: str, **layout):
        return make_run(uneven_base, tmp_path / name, method, **layout, **options)

    one, hybrid = run_in("one", micro_batch=5), run_in("hybrid", **TWO_BY_TWO)
    assert (hybrid.replicas, hybrid.shards, hybrid.gradient_accumulation_steps) == (2, 2, 3)
    run_ranks(train_here, 1, one)
    run_ranks(train_here, 4, hybrid)
    small_states = "small states" in case
    _assert_same_losses(hybrid, one, small_states)
    state = hybrid.folder / "checkpoints/checkpoint-1/state"
    assert {part.name for part in state.glob("rank-*")} == {"rank-00000-of-00002", "rank-00001-of-00002"}

    again = _as_if_killed(hybrid, 2, tmp_path / "again", hybrid)
    run_ranks(train_here, 4, again)
    assert _curve(again) == _curve(hybrid)
    [file] = hybrid.result_folder.glob("*model*.safetensors")
    for name, tensor in load_file(file).items():
        assert torch.equal(load_file(again.result_folder / file.name)[name], tensor), name

    if case in ("qlora", "full", "full, small states"):  # other layouts, and back
        plain = _as_if_killed(hybrid, 1, tmp_path / "plain", run_in("hybrid", processes=3))
        run_ranks(train_here, 3, plain)
        _assert_same_losses(plain, one, small_states)
        back = _as_if_killed(plain, 2, tmp_path / "back", hybrid)
        run_ranks(train_here, 4, back)
        _assert_same_losses(back, one, small_states)


WHOLE = {
    "qlora": ("qlora", {"lora": {"dropout": 0.2}}),
    "lora, trained tokens": ("lora", {"lora": {"trainable_tokens": ["<|eot_id|>"]}}),
    "lora, embedding in RAM": ("lora", {"embedding_offload": True}),
    "lora, weights in RAM": ("lora", {"offload_params": True}),
    "full": ("full", {}),
    "full, small states": ("full", SMALL),
}


@pytest.mark.parametrize("case", WHOLE)
def test_ranks_that_hold_a_whole_copy_each_train_as_one_and_go_on_sharded(case, tiny_base, make_run, tmp_path):
    """Ten rows are four passes of three ranks, two places filled up."""
    method, extra = WHOLE[case]
    options, layout = OPTIONS | extra, {"processes": 3, "replicas": 3}
    one = make_run(tiny_base, tmp_path / "one", method, micro_batch=5, **options)
    whole = make_run(tiny_base, tmp_path / "whole", method, **layout, **options)
    assert (whole.shards, whole.gradient_accumulation_steps) == (1, 4)
    run_ranks(train_here, 1, one)
    run_ranks(train_here, 3, whole)
    _assert_same_losses(whole, one, "small states" in case)
    sharded = make_run(tiny_base, tmp_path / "sharded", method, processes=2, **options)
    resumed = _as_if_killed(whole, 1, tmp_path / "sharded", sharded)
    run_ranks(train_here, 2, resumed)
    _assert_same_losses(resumed, one, "small states" in case)
    back = _as_if_killed(resumed, 2, tmp_path / "back", whole)
    run_ranks(train_here, 3, back)
    _assert_same_losses(back, one, "small states" in case)


def test_eval_has_the_numbers_of_one_rank(uneven_base, make_run, tmp_path):
    run = make_run(uneven_base, tmp_path, "qlora", **TWO_BY_TWO, **OPTIONS)
    run_ranks(train_here, 4, run)
    run_ranks(evaluate, 4, run)
    found = json.loads((tmp_path / "eval.json").read_text())
    run_ranks(evaluate, 1, make_run(uneven_base, tmp_path, "qlora", **OPTIONS))
    expected = json.loads((tmp_path / "eval.json").read_text())
    assert found["tuned"]["loss"] < 0.98 * found["base"]["loss"]
    for which in ("base", "tuned"):
        assert found[which]["tokens"] == expected[which]["tokens"]
        assert found[which]["loss"] == pytest.approx(expected[which]["loss"], rel=1e-4)


def _layout(run) -> dict:
    model, _ = sharded_model(run)
    share = share_of(run, dist.get_rank())
    parameters = dict(model.named_parameters())
    kinds = {(isinstance(p, DTensor), p.placements, tuple(p.device_mesh.shape)) for p in parameters.values()}
    rows = {name: (len(p), len(local_part(p))) for name, p in parameters.items()}
    bytes_ = {name: local_part(parameter) for name, parameter in parameters.items()}
    return {"share": share, "kinds": kinds, "rows": rows, "bytes": bytes_, "scales": _scales(model)}


def _scales(model) -> dict[str, torch.Tensor]:
    """The offset of each packed weight's scales: their mean."""
    modules = ((name, module) for name, module in model.named_modules() if isinstance(module, NF4Linear))
    return {name: module.quant_state.offset for name, module in modules}


def _layout_alone(run) -> dict:
    model, _ = sharded_model(run)
    return _scales(model)


def test_each_machine_holds_the_whole_model(uneven_base, make_run, tmp_path):
    run = make_run(uneven_base, tmp_path, "qlora", **TWO_BY_TWO)
    found = run_ranks(_layout, 4, run)
    assert [one["share"] for one in found] == [Share(0, 2, 0), Share(1, 2, 0), Share(0, 2, 1), Share(1, 2, 1)]
    for rank, one in enumerate(found):
        assert one["kinds"] == {(True, (Replicate(), Shard(0)), (2, 2))}
        for name, (total, mine) in one["rows"].items():
            start, stop = local_rows(total, rank % 2, 2)
            assert mine == stop - start, name
            first = found[rank % 2]["bytes"][name]
            assert torch.equal(one["bytes"][name].view(torch.uint8), first.view(torch.uint8)), name
    (tmp_path / "one").mkdir()
    [alone] = run_ranks(_layout_alone, 1, make_run(uneven_base, tmp_path / "one", "qlora", processes=1))
    for one in found:
        assert one["scales"].keys() == alone.keys() and len(alone)
        for name, offset in alone.items():
            torch.testing.assert_close(one["scales"][name], offset)


def _train_and_count(run) -> list[bool]:
    """Whether each reduction of gradients went on to the other machine."""
    reduce, found = param_group.foreach_reduce, []

    def counted(*args, **kwargs):
        found.append(args[11])  # all_reduce_grads
        return reduce(*args, **kwargs)

    param_group.foreach_reduce = counted
    train_here(run)
    return found


def _without_room(run) -> list[bool]:
    """The same on GPUs that have no room for whole gradients of the adapters."""
    train.setup_to_train = setup_of
    return _train_and_count(run)


ONE_STEP = OPTIONS | {"training": TRAINING | {"max_steps": 1, "save_strategy": "no"}}


def test_gradients_cross_the_network_once_a_step(tiny_base, make_run, tmp_path):
    once = make_run(tiny_base, tmp_path / "once", "lora", **TWO_BY_TWO, **ONE_STEP)
    layers, passes = 2, once.gradient_accumulation_steps
    for crossed in run_ranks(_without_room, 4, once):
        assert crossed == [False] * layers * (passes - 1) + [True] * layers
    often = make_run(tiny_base, tmp_path / "often", "full", **TWO_BY_TWO, **ONE_STEP | {"offload_params": True})
    for crossed in run_ranks(_train_and_count, 4, often):
        assert all(crossed), "gradients that live in host RAM don't wait on the GPU"


def _train_and_count_sums(run) -> list[int]:
    """How many earlier sums of copies' gradients are held where each reduction begins."""
    reduce, sums, held = param_group.foreach_reduce, [], []

    def are_held() -> int:
        return sum(one() is not None for one in sums)

    def counted(*args, **kwargs):
        until = time.monotonic() + 2
        while are_held() and time.monotonic() < until:
            time.sleep(0.01)  # gloo's thread may let go of the last one a moment later
        held.append(are_held())
        found = reduce(*args, **kwargs)
        sums.append(weakref.ref(found[4]))  # all_reduce_input
        return found

    param_group.foreach_reduce = counted
    train_here(run)
    return held


@pytest.mark.parametrize("ranks", [4, 2])
def test_sums_of_copies_are_let_go_of_unit_by_unit(ranks, uneven_base, make_run, tmp_path):
    """With bf16 weights they are no gradients, only what those are cast from."""
    one_pass = ONE_STEP | SMALL | {"training": ONE_STEP["training"], "batch": ranks}
    run = make_run(uneven_base, tmp_path, "full", processes=ranks, replicas=2, **one_pass)
    for held in run_ranks(_train_and_count_sums, ranks, run):
        assert len(held) > 3 and not any(held)


@pytest.mark.parametrize("options", [TWO_BY_TWO, {"processes": 2}, {"processes": 2, "offload_params": True}], ids=str)
def test_adapters_are_reduced_once_a_step_where_there_is_room(options, uneven_base, make_run, tmp_path):
    once, often = (make_run(uneven_base, tmp_path / name, "qlora", **options, **ONE_STEP) for name in ("once", "often"))
    layers, passes, ranks = 2, once.gradient_accumulation_steps, options["processes"]
    assert passes > 1
    for crossed in run_ranks(_train_and_count, ranks, once):
        assert crossed == [True] * layers
    for crossed in run_ranks(_without_room, ranks, often):
        assert len(crossed) == layers * passes
    norms = _curve(once, "grad_norm"), _curve(often, "grad_norm")
    assert_curve_equal_but_for_rounding(*norms, additions_to_a_step(once), of="grad_norm")


def _train_whole_and_count(run) -> tuple[int, set[type]]:
    """How often gradients were averaged over all ranks, and of what types the model's parameters are."""
    average, kinds = trainer.average_gradients, []

    def counted(model):
        kinds.append({type(parameter.data) for parameter in model.parameters()} | {isinstance(model, FSDPModule)})
        return average(model)

    trainer.average_gradients = counted
    train_here(run)
    return len(kinds), set.union(*kinds)


def test_gradients_of_whole_copies_travel_once_a_step(tiny_base, make_run, tmp_path):
    run = make_run(tiny_base, tmp_path, "qlora", processes=2, replicas=2, **ONE_STEP)
    assert run.gradient_accumulation_steps > 1
    for times, kinds in run_ranks(_train_whole_and_count, 2, run):
        assert times == 1 and kinds == {torch.Tensor, False}, "plain tensors, and no FSDP"


def _averaged(bucket_bytes: int) -> tuple[list[torch.Tensor | None], list[torch.Tensor], list[int]]:
    """Averaged gradients of a model, its weights, and the bytes sent at once: rank r had r + 1 times the weights."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    parts = [torch.nn.Linear(3, 5), torch.nn.Linear(4, 4, dtype=torch.float64), torch.nn.Linear(2, 7)]
    model, rank, sent = torch.nn.ModuleList(parts), dist.get_rank(), []
    model[0].bias.requires_grad_(False)
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        parameter.grad = (rank + 1) * parameter.detach().clone()
    if rank == 1:
        model[2].weight.grad = None
    send, replicas.BUCKET_BYTES = dist.all_reduce, bucket_bytes
    dist.all_reduce = lambda tensor: (sent.append(tensor.nbytes), send(tensor))
    average_gradients(model)
    return [parameter.grad for parameter in model.parameters()], list(model.parameters()), sent


@pytest.mark.parametrize(("bucket_bytes", "sizes"), [(2**26, [60, 160, 84]), (64, [60, 128, 32, 56, 28])])
def test_gradients_become_their_mean_in_buckets_of_one_dtype(bucket_bytes, sizes):
    """Linears of 3 x 5 without bias, 4 x 4 in float64, 7 x 2."""
    for gradients, weights, sent in run_ranks(_averaged, 2, bucket_bytes):
        assert sent == sizes and gradients[1] is None
        expected = [1.5 * weight for weight in weights]
        expected[4] = 0.5 * weights[4]  # rank 1 had none
        for gradient, mean in zip(gradients, expected, strict=True):
            if gradient is not None:
                torch.testing.assert_close(gradient, mean.detach())


def _clipped(max_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A norm and clipped gradients, the same on all ranks, where each adds up a little otherwise."""
    dist.init_process_group("gloo")
    total_norm = gradient_norm._norm
    gradient_norm._norm = lambda parts: total_norm(parts) * (1 + 1e-6 * dist.get_rank())
    model = torch.nn.Linear(3, 5)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return gradient_norm.clip_gradients(model.parameters(), max_norm), model.weight.grad


def test_copies_on_unlike_gpus_are_clipped_by_one_norm():
    (norm, gradients), *others = run_ranks(_clipped, 3, 0.5)
    torch.testing.assert_close(norm, torch.tensor(20.0).sqrt())
    for other_norm, other in others:
        assert torch.equal(other_norm, norm) and torch.equal(other, gradients)


def _tampered(run) -> str | None:
    """What is said when one weight of the last rank has another last bit."""
    model, _ = sharded_model(run)
    share = share_of(run, dist.get_rank())
    refuse_replicas_apart(model, share, 1)
    if dist.get_rank() == 3:
        rows = next(local_part(p) for n, p in model.named_parameters() if p.requires_grad and len(local_part(p)))
        rows.detach().view(torch.int32).view(-1)[0] ^= 1
    try:
        refuse_replicas_apart(model, share, 2)
    except FituneError as error:
        return str(error)


def test_replicas_that_are_no_longer_the_same_are_refused(tiny_base, make_run, tmp_path):
    said = run_ranks(_tampered, 4, make_run(tiny_base, tmp_path, "lora", **TWO_BY_TWO))
    assert len(set(said)) == 1
    assert said[0].startswith("step 2: the weights on rank 3 are no longer those of rank 1, whose copy they are")
