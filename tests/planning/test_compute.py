"""`profile.compute`: who may ask for fp8, what auto takes, what `plan` and `doctor` say of it."""

import json

import pytest
import torch
from click.testing import CliRunner
from ranks import run_ranks, sharded_model

from fitune.cli import cli
from fitune.config import run as runs
from fitune.config.model_shapes import find_shape
from fitune.errors import UsageError
from fitune.launching import doctor, preflight
from fitune.model.sharding import local_part
from fitune.planning import compute
from fitune.planning.fill import resolve
from fitune.planning.gpu_models import gpu_model
from fitune.planning.machine import Gpu, Machine
from fitune.planning.memory import resident
from fitune.planning.plan import setup_of
from fitune.planning.step_time import COMPUTE_EFFICIENCY, FP8_SPEEDUP, step_seconds

FP8 = "profile.compute=fp8"


def _plan(*arguments: str):
    return CliRunner().invoke(cli, ["plan", *arguments])


def _on(monkeypatch, name: str) -> None:
    machine = Machine((Gpu(name, 80.0, 79.0),), 500.0, 500.0)
    monkeypatch.setattr("fitune.planning.hardware.found_here", lambda: machine)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "single_gpu", "--gpu", "A100"], "needs compute capability 8.9, A100 has 8.0; use --set"),
        (["--profile", "fsdp_2x40gb"], "A100, taken for a card of 40 GiB, has 8.0; name yours with --gpu, or use"),
        (["--gpus", "1", "--gpu-memory", "24", "--gpu", "RTX 3090"], "RTX 3090 has 8.6; use --set"),
    ],
)
def test_plan_refuses_what_the_card_lacks_in_one_line(arguments, message):
    result = _plan("llama3_8b_qlora", *arguments, "--set", FP8)
    assert result.exit_code == 2
    assert message in result.output and "profile.compute=bf16" in result.output
    assert len(result.output.splitlines()) == 1


def test_train_refuses_it_before_anything_starts(monkeypatch, tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("{}\n")
    run = runs.resolve("tiny_qlora", "single_gpu", (FP8, f"data.prepared={tmp_path}"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(preflight, "local_config", lambda *_: tmp_path)
    _on(monkeypatch, "NVIDIA A100-SXM4-80GB")
    with pytest.raises(UsageError, match=r"A100 has 8\.0; use --set profile\.compute=bf16"):
        preflight.check_before_training(run, force=True)
    for name in ("NVIDIA H100 80GB HBM3", "a card nobody knows"):
        _on(monkeypatch, name)
        preflight.check_before_training(run, force=True)


def test_a_rank_refuses_a_card_that_no_table_knows(monkeypatch):
    from types import SimpleNamespace

    from fitune.training import train

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(train, "compute_capability", lambda device: 8.6)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some Card")
    run, on_gpu = runs.resolve("tiny_qlora", "single_gpu", (FP8,)), SimpleNamespace(device_type="cuda")
    with pytest.raises(UsageError, match=r"8\.9, Some Card has 8\.6; use --set profile\.compute=bf16"):
        train._check_compute(run, on_gpu)
    train._check_compute(runs.resolve("tiny_qlora", "single_gpu"), on_gpu)
    for capability in (8.9, 9.0, 10.0, 12.0):
        monkeypatch.setattr(train, "compute_capability", lambda device, capability=capability: capability)
        train._check_compute(run, on_gpu)


def test_a_gpus_compute_capability_is_a_number_that_compares(monkeypatch):
    from fitune.model.compute_capability import compute_capability

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 3))
    numbers = [compute_capability.__wrapped__(torch.device(kind)) for kind in ("cuda", "cpu")]
    assert numbers == [10.3, None]


def test_on_the_cpu_it_is_emulated_and_said(capsys):
    from types import SimpleNamespace

    from fitune.training.train import _check_compute

    run = runs.resolve("tiny_qlora", "cpu_2proc", (FP8,))
    compute.refuse_missing_fp8(run, None)
    _check_compute(run, SimpleNamespace(device_type="cpu"))
    assert "fp8 is emulated on the CPU" in capsys.readouterr().err


def test_memory_that_is_held_back_does_not_make_another_card():
    """A card of 80 GiB has fp8, whatever part of it a run may take; it is timed as that card, too."""
    asked = ["plan", "llama3_8b_lora", "--gpus", "1", "--gpu-memory", "80", "--set", FP8]
    done = CliRunner().invoke(cli, [*asked, "--set", "profile.gpu_memory_gib=40"])
    assert done.exit_code == 0 and " on H100;" in done.output, done.output
    smaller = CliRunner().invoke(cli, [*asked[:4], "--gpu-memory", "40", "--set", FP8])
    assert smaller.exit_code == 2 and "A100, taken for a card of 40 GiB, has 8.0" in smaller.stderr


@pytest.mark.parametrize("gib", ["1e400", ".inf", ".nan"])
def test_memory_that_is_no_number_is_refused(gib):
    for where in (["--gpus", "1", "--gpu-memory", "80"], ["--profile", "fsdp_1x48gb"]):
        refused = CliRunner().invoke(cli, ["plan", "llama3_8b_lora", *where, "--set", f"profile.gpu_memory_gib={gib}"])
        assert refused.exit_code == 2 and "gpu_memory_gib: Input should be a finite number" in refused.stderr


@pytest.mark.parametrize(
    ("processes", "said"), [(1, "1 CPU process, weights"), (2, "2 CPU processes, one copy of the model, weights")]
)
def test_plan_says_so_too_and_nothing_of_a_gpus_time(processes, said, tiny_base, tmp_path):
    one = "distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}\nuse_cpu: true\nnum_processes: 1\n"
    (tmp_path / "one.yaml").write_text(one)
    config = str(tmp_path / "one.yaml") if processes == 1 else "cpu_2proc"
    sets = (FP8, f"base.model={tiny_base}", f"profile.accelerate_config={config}")
    text = _plan("tiny_lora", "--profile", "cpu_2proc", *(word for each in sets for word in ("--set", each))).output
    assert "products in fp8 (emulated on the CPU: the same arithmetic, slower)" in text and "guess" not in text
    assert said in text


def test_plan_counts_full_fine_tuning_in_it():
    """No weight is kept in fp8. A layer's passes and its weights' gradients are faster by FP8_SPEEDUP at most."""

    def of(compute: str, *sets: str):
        sets = (f"profile.compute={compute}", "profile.micro_batch=4", "profile.kept_layers=0", *sets)
        run = runs.resolve("llama3_8b_full", "fsdp_2x80gb", sets)
        return setup_of(run, find_shape(run.recipe.base.model))

    for states in ("fp32", "bf16_8bit"):
        bf16, fp8 = (of(compute, f"profile.optimizer_state={states}") for compute in ("bf16", "fp8"))
        assert resident(fp8) == resident(bf16)
        slow, fast = (step_seconds(setup, gpu_model("H200"))["compute"] for setup in (bf16, fp8))
        passes = fp8.accumulation * 4 * 2 * fp8.tokens * fp8.shape.layers * fp8.shape.layer_linear_weights
        most = passes / (gpu_model("H200").bf16_tflops * 1e12 * COMPUTE_EFFICIENCY) * (1 - 1 / FP8_SPEEDUP)
        assert 0.6 * most < slow - fast < most
    guess = "products in fp8 (its time was measured on up to 2 H200, and is a guess here)"
    for profile, gpu, guessed in (
        ("fsdp_2x80gb", "H100", True),
        ("fsdp_2x80gb", "H200", False),
        ("fsdp_4x48gb", "H200", True),
    ):
        said = _plan("llama3_8b_full", "--profile", profile, "--gpu", gpu, "--set", FP8).output
        assert "products in fp8" in said and (guess in said) is guessed
    refused = _plan("llama3_8b_full", "--profile", "fsdp_2x80gb", "--gpu", "A100", "--set", FP8)
    assert refused.exit_code == 2 and "A100 has 8.0; use --set profile.compute=bf16" in refused.output


@pytest.mark.parametrize(("name", "text"), [("NVIDIA L40S", "L40S has it"), ("NVIDIA A10G", "8.6, fp8 needs 8.9")])
def test_doctor_says_whether_the_card_has_it(name, text, monkeypatch):
    _on(monkeypatch, name)
    [finding] = doctor._fp8()
    assert text in finding.text


def test_auto_takes_what_is_proven_where_the_card_has_it(monkeypatch):
    def taken(gpu: str | None, recipe: str = "llama3_8b_qlora", profile: str = "single_gpu", *sets: str) -> str:
        run = runs.resolve(recipe, profile, sets)
        return compute.settled(run, gpu and gpu_model(gpu)).profile.compute

    assert not compute.AUTO_TAKES_FP8 and taken("H100") == "bf16"
    assert resolve("llama3_8b_qlora", "single_gpu").profile.compute == "bf16"
    assert taken("H100", "llama3_8b_qlora", "single_gpu", FP8) == "fp8"
    monkeypatch.setattr(compute, "AUTO_TAKES_FP8", True)
    assert taken("H100") == taken("RTX 4090") == "fp8"
    assert taken("A100") == taken(None) == taken("H100", "llama3_8b_full", "fsdp_2x80gb") == "bf16"
    assert taken("H100", "llama3_8b_qlora", "single_gpu", "profile.compute=bf16") == "bf16"
    assert resolve("llama3_8b_qlora", "single_gpu").profile.compute == "fp8"


def _offered(*arguments: str) -> str:
    """What follows "in fp8"; '' without such a line."""
    lines = _plan(*arguments).output.splitlines()
    return next((line.removeprefix("in fp8").strip() for line in lines if line.startswith("in fp8")), "")


def test_plan_says_what_it_would_bring_where_the_card_has_it():
    flags, ends = ("llama3_8b_qlora", "--profile", "single_gpu"), f": --set {FP8} (rounds more: docs/fp8.md)"
    for gpu, guess in (("H200", ""), ("RTX 4090", ", a guess")):
        seconds = [json.loads(_plan(*flags, "--gpu", gpu, "--set", f"profile.compute={compute}", "--json").output)
                   for compute in ("fp8", "auto")]  # fmt: skip
        fp8, bf16 = (f"{float(format(told['estimate']['step_seconds'], '.2g')):,g} s a step" for told in seconds)
        assert _offered(*flags, "--gpu", gpu) == f"{fp8}{guess}{ends}" and fp8 != bf16
        assert seconds[1]["in_fp8"]["step_seconds"] == seconds[0]["estimate"]["step_seconds"]
    in_full = _offered("llama3_8b_full", "--profile", "fsdp_2x80gb", "--gpu", "H200")
    assert " s a step: " in in_full and in_full.endswith(ends)
    more_fits = _offered("llama3_70b_lora", "--gpu", "H100", "--gpus", "2", "--host-memory", "256")
    assert more_fits.startswith("2 GPUs, one copy of the model, weights on the GPUs, ") and more_fits.endswith(ends)


@pytest.mark.parametrize(
    "arguments",
    [
        ("llama3_8b_qlora", "--gpu", "RTX 3090"),
        ("llama3_8b_qlora", "--profile", "fsdp_2x40gb"),
        ("llama3_8b_full", "--profile", "fsdp_2x80gb", "--gpu", "A100"),
        ("llama3_8b_qlora", "--gpu", "H100", "--set", "profile.compute=bf16"),
        ("llama3_8b_qlora", "--gpu", "H100", "--set", FP8),
    ],
)
def test_it_is_not_offered_where_it_is_missing_unproven_or_was_decided(arguments):
    assert _offered(*arguments) == "" and " a step" in _plan(*arguments).output


def test_what_does_not_fit_in_bf16_may_fit_so():
    there = ("--gpus", "4", "--gpu-memory", "32", "--host-memory", "64")
    said = {gpu: _plan("llama3_70b_lora", "--gpu", gpu, *there).stderr for gpu in ("RTX 5090", "A100")}
    assert "what fits: --set profile.compute=fp8 or the recipe llama3_70b_qlora" in said["RTX 5090"]
    assert "does not fit" in said["A100"] and "fp8" not in said["A100"]
    fits = _plan("llama3_70b_lora", "--gpu", "RTX 5090", *there, "--set", FP8)
    assert fits.exit_code == 0 and "4 GPUs, one copy of the model, weights on the GPUs" in fits.output


def test_plan_counts_its_memory_and_its_speed():
    def of(compute: str):
        sets = (f"profile.compute={compute}", "profile.micro_batch=4", "profile.kept_layers=32")
        run = runs.resolve("llama3_8b_qlora", "fsdp_1x48gb", sets)
        return setup_of(run, find_shape(run.recipe.base.model))

    bf16, fp8 = of("bf16"), of("fp8")
    scales = 32 * (4096 + 1024 + 1024 + 4096 + 14336 + 14336 + 4096) * 4  # one of four bytes for each row of a weight
    assert fp8.statistics - bf16.statistics == scales
    slow, fast = (step_seconds(setup, gpu_model("H200"))["compute"] for setup in (bf16, fp8))
    assert 1.2 < slow / fast < 2  # attention and what moves memory stay as slow

    flags = ["llama3_8b_qlora", "--profile", "single_gpu", "--set", FP8]
    guess = "products in fp8 (its time was measured on up to 1 H200, and is a guess here)"
    for gpu, said in (("H200", "products in fp8\n"), ("H100", guess), ("RTX 4090", guess)):
        assert said in _plan(*flags, "--gpu", gpu).output
    assert guess in _plan("llama3_8b_qlora", "--gpus", "2", "--gpu", "H200", "--set", FP8).output
    assert json.loads(_plan(*flags, "--json").output)["compute"] == "fp8"
    assert json.loads(_plan(*flags[:-2], "--json").output)["compute"] == "bf16"


def _bytes_held(run) -> dict[str, int]:
    """What this rank holds after a pass, under the names that `plan` has for it."""
    model, _ = sharded_model(run)
    tokens = torch.arange(1, 9).unsqueeze(0)
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    held = dict.fromkeys(("sharded weights", "embedding and head", "LoRA weights"), 0)
    for name, parameter in model.named_parameters():
        of_embedding = "embed_tokens" in name or "lm_head" in name
        kind = "LoRA weights" if "lora_" in name else "embedding and head" if of_embedding else "sharded weights"
        held[kind] += local_part(parameter).nbytes
    kept = [vars(module).get(name) for module in model.modules() for name in ("scales", "fp8_scales")]
    storages = {scales.untyped_storage().data_ptr(): scales.untyped_storage() for scales in kept if scales is not None}
    return held | {"quantisation statistics": sum(storage.nbytes() for storage in storages.values())}


@pytest.mark.parametrize("ranks", [1, 2])
def test_plan_counts_the_bytes_that_lora_keeps_in_fp8(ranks, tiny_base, make_run, tmp_path):
    run = make_run(tiny_base, tmp_path, "lora", processes=ranks, mixed_precision="bf16", compute="fp8")
    planned = resident(setup_of(run, find_shape(str(tiny_base))))
    for held in run_ranks(_bytes_held, ranks, run):
        assert held == {name: planned[name] for name in held}
