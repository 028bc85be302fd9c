"""A run is asked and measured on other hardware than it was trained on, and says so."""

import json
import re
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from ranks import run_ranks
from rounding import additions_to_logits, rounding
from test_evaluate_generate import write_adapter
from transformers import LlamaConfig

from fitune.cli import cli
from fitune.config import run as runs
from fitune.config.accelerate_config import written_out
from fitune.config.model_shapes import find_shape
from fitune.config.schema import AccelerateConfig
from fitune.errors import UsageError
from fitune.planning.asking import as_trained
from fitune.planning.limits import given_machine
from fitune.planning.machine import Gpu, Machine
from fitune.planning.memory import gpu_peak, host_peak
from fitune.planning.plan import setup_of
from fitune.planning.sizes import GIB
from fitune.training import evaluate, train
from fitune.training.asked_here import Held, as_held, held_here, rows_of_eval

ADDITIONS = 256


@pytest.fixture
def machine_is(monkeypatch):
    def set_to(machine: Machine) -> None:
        monkeypatch.delenv("FITUNE_GPU_CAP_GIB", raising=False)
        monkeypatch.setattr("fitune.planning.hardware.found_here", lambda: machine)

    return set_to


@pytest.mark.parametrize(
    ("recipe", "profile", "gpus", "gib", "host", "taken"),
    [
        ("llama3_70b_qlora", "fsdp_4x24gb", 4, 23.6, 64, None),
        ("llama3_70b_qlora", "fsdp_4x24gb", 1, 47.4, 64, "weights in NF4, on 1 GPU"),
        ("llama3_70b_qlora", "fsdp_4x24gb", 3, 23.6, 64, "weights in NF4, on 3 GPUs"),
        ("llama3_70b_qlora", "fsdp_1x48gb", 1, 11.6, 64, "weights in NF4, on 1 GPU, from host RAM layer by layer"),
        ("llama3_70b_qlora", "fsdp_offload_1x12gb", 1, 11.6, 64, None),
        ("llama3_8b_qlora", "single_gpu_8gb", 1, 7.6, 32, None),
        ("llama3_8b_lora", "fsdp_2x40gb", 1, 39.4, 64, "weights as stored, on 1 GPU"),
        ("llama3_8b_lora", "fsdp_1x48gb", 1, 11.6, 64, "weights as stored, on 1 GPU, from host RAM layer by layer"),
        ("llama3_8b_lora fp8", "single_gpu", 1, 15.6, 64, "weights as stored, on 1 GPU, from host RAM layer by layer"),
        ("llama3_8b_qlora", "single_gpu", 0, 0, 64, "weights in NF4, on the CPU"),
        ("llama3_8b_full", "fsdp_2x80gb", 2, 79, 64, None),
    ],
)
def test_a_run_is_held_as_in_training_where_that_fits_and_else_in_another_way_that_is_said(
    machine_is, tmp_path, capsys, recipe, profile, gpus, gib, host, taken
):
    machine_is(given_machine(gpus, gib, host) if gpus else Machine((), host, host))
    recipe, _, fp8 = recipe.partition(" ")
    sets = ("profile.micro_batch=1", "profile.kept_layers=0", f"profile.compute={fp8 or 'bf16'}")
    run = runs.resolve(recipe, profile, sets, str(tmp_path / "run"))
    with held_here(run) as way:
        said, held = capsys.readouterr().err, as_held(run, way.config)
    assert (said.split(": ")[1] if said else None) == taken
    assert not taken or re.search(r"; as it was trained, (it takes \d GPUs?|[\d.]+ GiB of)", said)
    assert (held == run) == (taken is None) == (way == Held())
    if taken and gpus:
        assert f"on {held.accelerate.num_processes} GPU" in taken and held.profile.num_gpus <= gpus
        assert held.accelerate.offload_params == ("host RAM" in taken)
    assert held.folder == run.folder and held.recipe == run.recipe


def test_of_several_whole_copies_one_answers_and_all_of_them_measure(machine_is, tmp_path, capsys):
    run = runs.resolve("llama3_8b_lora", "fsdp_4x48gb", ("profile.replicas=4",), str(tmp_path / "run"))
    machine_is(given_machine(4, 47.4, 256))
    with held_here(run) as held:
        alone = as_held(run, held.config)
    assert (alone.accelerate.num_processes, alone.replicas, alone.accelerate.offload_params) == (1, 1, False)
    with held_here(run, rows_of_eval(run)) as held:
        assert held == Held()
    machine_is(given_machine(4, 11.6, 256))
    with held_here(run) as held:
        assert as_held(run, held.config).accelerate.num_processes > 1, "no GPU has room for a whole copy"
    assert "of each GPU are needed" in capsys.readouterr().err
    machine_is(Machine((), 256, 250))
    with held_here(run) as held:
        assert as_held(run, held.config).accelerate.use_cpu
    assert "on the CPU" in (said := capsys.readouterr().err) and "it takes 4 GPUs, this machine has 0" in said


@pytest.mark.parametrize("max_length", [512, 8192])
@pytest.mark.parametrize(
    ("recipe", "profile"),
    [
        ("llama3.1_8b_qlora", "single_gpu_8gb"),
        ("llama3.1_8b_qlora", "fsdp_2x40gb"),
        ("llama3_70b_qlora", "fsdp_offload_1x12gb"),
        ("llama3_8b_lora", "fsdp_1x48gb"),
        ("llama3_8b_full", "fsdp_2x80gb"),
    ],
)
def test_what_training_took_is_enough_to_be_asked_as_trained(machine_is, tmp_path, recipe, profile, max_length):
    sets = (f"max_length={max_length}", "profile.micro_batch=1", "profile.kept_layers=0", "profile.compute=bf16")
    run = runs.resolve(recipe, profile, sets, str(tmp_path / "run"))
    setup = setup_of(run, find_shape(run.recipe.base.model))
    machine_is(given_machine(setup.ranks, gpu_peak(setup).total / GIB, host_peak(setup) / GIB))
    with held_here(run) as held:
        assert held == Held()


def test_memory_that_ran_out_in_another_way_is_not_blamed_on_the_runs_rows(make_run, tiny_base, tmp_path, monkeypatch):
    run = make_run(tiny_base, tmp_path / "run", "lora")
    run = run.model_copy(update={"profile": run.profile.model_copy(update={"micro_batch": 8})})
    run.folder.mkdir()
    (run.folder / "run.yaml").write_text(runs.dump(run))
    (run.folder / "accelerate.yaml").write_text(written_out(run.accelerate))
    said = []

    def runs_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(evaluate, "evaluate", runs_out)
    monkeypatch.setattr(train, "say_while_training", said.append)
    for flags in ([], ["--held-by", str(run.folder / "accelerate.yaml")]):
        with pytest.raises(SystemExit):
            evaluate.main([str(run.folder), *flags])
    assert "try micro_batch: 4" in said[0]
    assert "micro_batch" not in said[1] and "take GPUs with more memory" in said[1]


def test_a_full_run_is_refused_with_its_models_folder(machine_is, tmp_path):
    machine_is(given_machine(1, 79, 64))
    run = runs.resolve("llama3_8b_full", "fsdp_2x80gb", (), str(tmp_path / "run"))
    message = rf"it takes 2 GPUs, this machine has 1; give its model, .*: {run.folder}/model$"
    with pytest.raises(UsageError, match=message), held_here(run):
        pass
    checkpoint = run.model_copy(update={"checkpoint": str(run.folder / "checkpoints" / "checkpoint-1")})
    message = r"checkpoint-1: it takes 2 GPUs, this machine has 1; of method full the run's result alone goes elsewhere"
    with pytest.raises(UsageError, match=message), held_here(checkpoint):
        pass


@pytest.mark.parametrize(("gib", "rows"), [(79, None), (10.5, 7), (9.4, 4), (8.2, 1)])
def test_eval_takes_as_many_rows_a_pass_as_there_is_room_for(machine_is, tmp_path, capsys, monkeypatch, gib, rows):
    machine_is(given_machine(1, gib, 64))
    sets = ("profile.micro_batch=8", "profile.kept_layers=0")
    run = runs.resolve("llama3_8b_qlora", "single_gpu", sets, str(tmp_path / "run"))
    with held_here(run, rows_of_eval(run)) as way:
        assert (way.config, way.rows) == (None, rows)
    said = f"{run.folder}: {rows} rows a pass, not 8 as in training: "
    assert capsys.readouterr().err.startswith(said) if rows else not capsys.readouterr().err
    setup = setup_of(run, find_shape(run.recipe.base.model))
    needed = [as_trained(setup, replace(rows_of_eval(run), rows=n)).gpu for n in ((rows or 8), (rows or 8) + 1)]
    assert needed[0] <= gib < needed[1] or not rows
    run.folder.mkdir()
    (run.folder / "run.yaml").write_text(runs.dump(run))
    evaluated = []
    monkeypatch.setattr(evaluate, "evaluate", lambda run, *_: evaluated.append(run.profile.micro_batch))
    evaluate.main([str(run.folder), *way.flags])
    assert evaluated == [rows or 8]


def test_eval_in_another_way_has_room_for_rows_of_the_runs_length(machine_is, tmp_path, capsys):
    """As 128 GiB of RAM hold the weights anyway, the length of the rows alone decides about the GPU."""
    machine_is(given_machine(1, 11.6, 128))
    for length, is_held in ((8192, True), (131072, False)):
        sets = (f"max_length={length}", "profile.micro_batch=1")
        run = runs.resolve("llama3.3_70b_qlora", "fsdp_1x48gb", sets, str(tmp_path / "run"))
        refused = pytest.raises(UsageError, match="too large to ask here") if not is_held else nullcontext()
        with refused, held_here(run, rows_of_eval(run)) as way:
            assert way.config


def test_gpus_that_are_gone_are_replaced_by_others(machine_is, tmp_path):
    run = runs.resolve("llama3_8b_qlora", "single_gpu", (), str(tmp_path / "run"))
    run = run.model_copy(update={"accelerate": run.accelerate.model_copy(update={"gpu_ids": "GPU-gone"})})
    machine_is(Machine((Gpu("NVIDIA GeForce RTX 4090", 24, 23.5, identity="GPU-here"),), 64, 60))
    with held_here(run) as held:
        assert held == Held()


def test_a_runs_own_tokens_are_counted_in_another_way(machine_is, tmp_path, capsys):
    machine_is(given_machine(1, 23.6, 64))
    needed = []
    for tokens in ("[]", "['<|eot_id|>']"):
        sets = (f"lora.trainable_tokens={tokens}",)
        run = runs.resolve("llama3_70b_qlora", "fsdp_4x24gb", sets, str(tmp_path / "run"))
        with held_here(run):
            needed.append(float(re.search(r"([\d.]+) GiB of each GPU", capsys.readouterr().err)[1]))
    assert needed[1] - needed[0] == pytest.approx(128256 * 8192 * 2 / GIB, abs=0.1), "the loss takes a copy of the head"


def test_what_no_way_here_holds_is_refused_before_anything_starts(machine_is, tmp_path):
    machine_is(given_machine(1, 11.6, 16))
    run = runs.resolve("llama3_70b_qlora", "fsdp_1x48gb", (), str(tmp_path / "run"))
    message = r"adapter: too large to ask here: .* of RAM are needed, 16\.0 are free, .*, or see `.* plan .*/adapter`"
    with pytest.raises(UsageError, match=message), held_here(run):
        pass


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_commands_hold_a_run_of_two_gpus_on_this_machine(
    make_run, tiny_base, machine_is, tmp_path, capfd, quick_ranks, method, plain_linear4bit
):
    """The real `generate` and `eval`, on a machine without a GPU: answers and losses are those of its own processes."""
    made = make_run(tiny_base, tmp_path / "run", method)
    run_ranks(write_adapter, 1, made)
    (made.folder / "run.yaml").write_text(runs.dump(made))
    (made.folder / "accelerate.yaml").write_text(written_out(made.accelerate))
    ask = ["generate", str(made.folder), "--prompt", "River stone letter.", "--max-new-tokens", "8", "--json"]

    def asked(name: str) -> tuple[list, dict, str]:
        said = ""
        for command in ([*ask, str(tmp_path / name)], ["eval", str(made.folder)]):
            result = CliRunner().invoke(cli, command)
            assert result.exit_code == 0, result.output + capfd.readouterr().err
            said += result.stderr
        return json.loads((tmp_path / name).read_text()), json.loads((made.folder / "eval.json").read_text()), said

    own_answers, own_losses, _ = asked("own.json")
    machine_is(Machine((), 64, 60))
    gpus = AccelerateConfig(path=str(tmp_path / "two.yaml"), num_processes=2, mixed_precision="bf16")
    (tmp_path / "two.yaml").write_text(written_out(gpus))
    (made.folder / "accelerate.yaml").unlink()
    (made.folder / "run.yaml").write_text(runs.dump(made.model_copy(update={"accelerate": gpus})))
    before = (made.folder / "run.yaml").read_text()
    answers, losses, said = asked("here.json")
    assert answers == own_answers
    error = rounding(additions_to_logits(LlamaConfig.from_pretrained(tiny_base), ADDITIONS))
    for who in ("base", "tuned"):
        assert losses[who]["tokens"] == own_losses[who]["tokens"]
        assert losses[who]["loss"] == pytest.approx(own_losses[who]["loss"], rel=error)
    assert (made.folder / "run.yaml").read_text() == before
    way = "as stored" if method == "lora" else "in NF4"
    assert said.count(f"{made.folder}: weights {way}, on the CPU: ") == 2
