"""`cli.py merge` on run folders made by hand: run.yaml as `train` writes it, an adapter as PEFT does."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapters import put_through_nf4
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from results import empty_adapter
from rounding import distance
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fitune.cli import cli
from fitune.config import run as runs
from fitune.data.chat_template import template_hash
from fitune.data.dataset import load_tokenizer
from fitune.export.chat_record import CHAT_RECORD, ChatRecord, read_chat_record, write_chat_record
from fitune.export.merge_record import read_merge_record
from fitune.launching.run_folder import finish
from fitune.training.given_run import check_data, finished_run
from fitune.training.manifest import identify, write_manifest
from fitune.weights.base_identity import BASE_RECORD, identify_base, write_base_record

IDS = torch.tensor([[5, 77, 300, 9, 1, 80]])


@pytest.fixture(scope="module")
def other_base(tiny_base, tmp_path_factory):
    """The shapes of `tiny_base`, other weights."""
    folder = Path(shutil.copytree(tiny_base, tmp_path_factory.mktemp("models") / "other"))
    file = folder / "model.safetensors"
    save_file(
        {name: tensor.flip(0).contiguous() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"}
    )
    return folder


def _write_run(run) -> Path:
    run.folder.mkdir(parents=True)
    (run.folder / "run.yaml").write_text(runs.dump(run), encoding="utf-8")
    return run.folder


def _make_adapter(run, folder: Path, scale: float = 0.05) -> None:
    """With weights that change every logit, and the record that training leaves."""
    base = Path(run.recipe.base.model)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(folder)
    file, generator = folder / "adapter_model.safetensors", torch.Generator().manual_seed(1)
    save_file({n: torch.randn(t.shape, generator=generator) * scale for n, t in load_file(file).items()}, file)
    write_base_record(folder, replace(identify_base(run.recipe.base, base), computed_in="nf4"))
    write_chat_record(folder, ChatRecord(template_hash(load_tokenizer(run.recipe, base)), None))


@pytest.fixture
def run(tiny_base, make_run, tmp_path):
    """A finished qlora run with one checkpoint, whose adapter differs from the result's."""
    run = make_run(tiny_base, tmp_path / "run", "qlora")
    _write_run(run)
    _make_adapter(run, run.result_folder)
    checkpoint = run.folder / "checkpoints" / "checkpoint-5"
    _make_adapter(run, checkpoint / "adapter", scale=0.1)
    base = identify_base(run.recipe.base, tiny_base)
    state = checkpoint / "state/rank-00000-of-00001/model.safetensors"
    state.parent.mkdir(parents=True)
    state.touch()  # nothing that merge reads
    write_manifest(checkpoint, 5, run, identify(run, base, load_tokenizer(run.recipe, tiny_base)), {})
    finish(run, 5, 1.0)
    return run


def _invoke(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)))


def _merge(*arguments):
    return _invoke("merge", *arguments)


def _refused(*arguments) -> str:
    """The one line of a refusal with exit code 2; checks that no output was made."""
    outcome = _merge(*arguments)
    assert outcome.exit_code == 2, outcome.output
    assert isinstance(outcome.exception, SystemExit)
    assert outcome.stderr.startswith("error: ")
    assert outcome.stderr.count("\n") == 1
    assert outcome.stdout == ""
    output = Path(arguments[arguments.index("--output") + 1])
    assert not list(output.parent.glob(f".{output.name}*"))
    return outcome.stderr


def _logits(folder, adapter=None, *, through_nf4=False) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = put_through_nf4(model) if through_nf4 else model
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    with torch.no_grad():
        return model.eval()(IDS).logits


def _assert_merged(output, base, adapter, *, through_nf4=True):
    """Up to the rounding of merged weights to bf16, the logits are those of the adapter on its base, as QLoRA has it.

    NF4 alone moves the logits by 10 %.
    """
    expected = _logits(base, adapter, through_nf4=through_nf4)
    assert distance(_logits(output), expected) < 0.01
    assert distance(_logits(base), expected) > 0.1


def test_a_run_is_merged_into_its_own_base(run, tiny_base, tmp_path):
    outcome = _merge(run.folder, "--output", tmp_path / "new" / "out")
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stdout.startswith(f"merged: {tmp_path}/new/out\nnext:   python cli.py generate")
    assert "warning" not in outcome.stderr and "note" not in outcome.stderr
    _assert_merged(tmp_path / "new" / "out", tiny_base, run.result_folder)
    assert read_chat_record(tmp_path / "new" / "out") == read_chat_record(run.result_folder)
    assert (tmp_path / "new" / "out" / CHAT_RECORD).is_file()


def test_onto_says_which_weights_the_adapter_is_added_to(run, tiny_base, tmp_path):
    for onto in ("trained", "original"):
        output = tmp_path / onto
        outcome = _merge(run.folder, "--output", output, "--onto", onto)
        assert outcome.exit_code == 0, outcome.output
        _assert_merged(output, tiny_base, run.result_folder, through_nf4=onto == "trained")
        assert read_merge_record(output).onto == onto
        assert ("no loss here is of this model" in (output / "README.md").read_text()) == (onto == "original")
    assert distance(_logits(tmp_path / "trained"), _logits(tmp_path / "original")) > 0.05


def test_a_merge_ends_with_a_check_unless_it_is_told_not_to(run, tmp_path):
    outcome = _merge(run.folder, "--output", tmp_path / "out")
    assert "check: 4 prompts, " in outcome.stderr
    measured = read_merge_record(tmp_path / "out").check
    assert 0 < measured["largest_difference"] <= measured["bound"]
    outcome = _merge(run.folder, "--output", tmp_path / "hasty", "--no-check")
    assert "check:" not in outcome.stderr
    assert read_merge_record(tmp_path / "hasty").check is None


def test_onto_is_refused_where_it_means_nothing(make_run, tiny_base, tmp_path):
    for method, onto, said in (("lora", "trained", "trained on the original weights"), ("full", "original", "--onto")):
        run = make_run(tiny_base, tmp_path / method, method)
        _write_run(run)
        empty_adapter(run.result_folder)
        for name in ("config.json", "model.safetensors"):  # of method full
            (run.result_folder / name).touch()
        assert said in _refused(run.folder, "--output", tmp_path / "out", "--onto", onto)


def test_an_adapters_folder_is_merged_into_the_base_it_names(run, tiny_base, tmp_path):
    """A run's own adapter remembers that it was trained through NF4; one without a record is taken as it is."""
    outcome = _merge(run.result_folder, "--output", tmp_path / "own")
    assert outcome.exit_code == 0, outcome.output
    _assert_merged(tmp_path / "own", tiny_base, run.result_folder)
    (run.result_folder / BASE_RECORD).unlink()
    outcome = _merge(run.result_folder, "--output", tmp_path / "strange", "--base", tiny_base)
    assert outcome.exit_code == 0, outcome.output
    _assert_merged(tmp_path / "strange", tiny_base, run.result_folder, through_nf4=False)
    config = run.result_folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    assert "give it with --base MODEL" in _refused(run.result_folder, "--output", tmp_path / "out")


@pytest.mark.parametrize("inside", [False, True], ids=["by path", "from inside"])
def test_a_checkpoint_of_an_unfinished_run_is_merged(run, tiny_base, tmp_path, monkeypatch, inside):
    shutil.rmtree(run.result_folder)
    checkpoint = run.folder / "checkpoints" / "checkpoint-5"
    if inside:
        monkeypatch.chdir(checkpoint.parent)
    outcome = _merge("checkpoint-5" if inside else checkpoint, "--output", tmp_path / "out")
    assert outcome.exit_code == 0, outcome.output
    _assert_merged(tmp_path / "out", tiny_base, checkpoint / "adapter")


def test_base_names_another_base_which_needs_force(run, tiny_base, other_base, tmp_path):
    said = _refused(run.folder, "--output", tmp_path / "out", "--base", other_base)
    assert f"{other_base}: has the shapes but not the weights of the adapter's base {tiny_base}" in said
    assert not (tmp_path / "out").exists()
    outcome = _merge(run.folder, "--output", tmp_path / "out", "--base", other_base, "--force")
    assert outcome.exit_code == 0, outcome.output
    assert "warning" in outcome.stderr
    _assert_merged(tmp_path / "out", other_base, run.result_folder)


def test_method_full_is_copied(tiny_base, make_run, tmp_path):
    run = make_run(tiny_base, tmp_path / "run", "full")
    _write_run(run)
    shutil.copytree(tiny_base, run.result_folder)
    said = _refused(run.folder, "--output", tmp_path / "out", "--base", tiny_base)
    assert "method full leaves a whole model, nothing to merge: leave out --base" in said
    outcome = _merge(run.folder, "--output", tmp_path / "out")
    assert outcome.exit_code == 0, outcome.output
    assert torch.equal(_logits(tmp_path / "out"), _logits(tiny_base))  # the same bytes through the same code
    checkpoint = run.folder / "checkpoints" / "checkpoint-5"
    state = checkpoint / "state/rank-00000-of-00001/model.safetensors"
    state.parent.mkdir(parents=True)
    state.touch()
    said = _refused(checkpoint, "--output", tmp_path / "again")
    assert "of method full, eval and generate alone take a checkpoint" in said
    identity = identify(run, identify_base(run.recipe.base, tiny_base), load_tokenizer(run.recipe, tiny_base))
    write_manifest(checkpoint, 5, run, identity, {})
    assert finished_run(checkpoint, asked=True).checkpoint == str(checkpoint)
    state.write_bytes(b"damaged")
    outcome = _invoke("generate", checkpoint, "--prompt", "Who?")
    assert outcome.exit_code == 2 and "give another checkpoint" in outcome.stderr


def test_what_runs_leave_is_no_run(run, tiny_base, tmp_path):
    assert f"{tiny_base}: a model's folder, no run's" in _refused(tiny_base, "--output", tmp_path / "out")
    outcome = _invoke("report", run.result_folder)
    assert outcome.exit_code == 2 and f"{run.result_folder}: an adapter's folder, no run's" in outcome.stderr


def test_what_is_not_a_run_is_refused(run, tmp_path):
    output = ("--output", tmp_path / "out")
    (tmp_path / "notes.txt").write_text("seed: 3")
    assert "notes.txt: is a file; expected a run folder" in _refused(tmp_path / "notes.txt", *output)
    for wrong in (tmp_path / "nowhere", tmp_path, tmp_path / "checkpoints" / "checkpoint-1"):
        assert "no such file; expected a run folder" in _refused(wrong, *output)
    meant = f"checkpoint-5: no such file; expected {run.folder / 'checkpoints' / 'checkpoint-5'}"
    assert meant in _refused(run.folder / "checkpoint-5", *output)
    assert "checkpoint-6/adapter: no such folder" in _refused(run.folder / "checkpoints" / "checkpoint-6", *output)
    shutil.rmtree(run.result_folder)
    assert "the run has not finished" in _refused(run.folder, *output)
    run_yaml = run.folder / "run.yaml"
    run_yaml.write_text(run_yaml.read_text().replace("seed:", "sed:"))
    assert f"{run_yaml}: " in _refused(run.folder, *output)


def test_damaged_adapters_and_missing_bases_are_refused(run, tiny_base, tmp_path):
    output = ("--output", tmp_path / "out")
    assert "no such folder, and not a Hugging Face id" in _refused(run.folder, *output, "--base", "no-such-model")
    config = run.result_folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_bias": True}))
    assert "lora_bias=True is not supported" in _refused(run.folder, *output)
    config.unlink()
    said = _refused(run.folder, *output)
    assert (
        f"{config}: no such file, so the run's result is not whole" in said and f"train --resume {run.folder}" in said
    )


def test_a_model_that_lost_its_weights_is_refused(tiny_base, make_run, tmp_path):
    run = make_run(tiny_base, tmp_path / "run", "full")
    _write_run(run)
    shutil.copytree(tiny_base, run.result_folder)
    (run.result_folder / "model.safetensors").unlink()
    said = _refused(run.folder, "--output", tmp_path / "out")
    assert "model/model.safetensors: no such file, so the run's result is not whole" in said


def test_held_out_rows_that_are_gone_are_told_before_processes_start(run, prepared, tmp_path):
    """Rows of training that are gone are not asked for."""
    data = Path(shutil.copytree(prepared, tmp_path / "data"))
    file = run.folder / "run.yaml"
    file.write_text(file.read_text().replace(str(prepared), str(data)))
    (data / "train.jsonl").unlink()
    check_data(runs.load(run.folder), asked_as_trained=True)
    for lose, said in (((data / "test.jsonl").write_bytes, "no rows; prepare held-out"), (None, "no such file; run")):
        lose(b"") if lose else shutil.rmtree(data)
        for command in (["eval", run.folder], ["generate", run.folder, "--test", "1"]):
            outcome = _invoke(*command)
            assert outcome.exit_code == 2 and f"{data}/test.jsonl: {said}" in outcome.stderr


def test_existing_output_is_refused_before_a_base_is_looked_for(run, tmp_path):
    (tmp_path / "out").mkdir()
    said = _refused(run.folder, "--output", tmp_path / "out", "--base", "no-such-model")
    assert f"{tmp_path}/out: exists already" in said
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_eval_and_generate_take_a_checkpoint_too(command, run, monkeypatch):
    """The ranks are given the run, and the checkpoint beside it."""
    started = []
    monkeypatch.setattr(
        "fitune.launching.launch.launch", lambda run, module, *words, **flags: started.append((run, words)) or 0
    )
    checkpoint = run.folder / "checkpoints" / "checkpoint-5"
    ask = ["--prompt", "Who?"] if command == "generate" else []
    for folder in (run.folder, checkpoint):
        assert CliRunner().invoke(cli, [command, str(folder), *ask]).exit_code == 0
    (of_run, words), (of_checkpoint, more) = started
    assert of_run.folder == of_checkpoint.folder == run.folder
    assert "--checkpoint" not in words
    assert more[more.index("--checkpoint") + 1] == str(checkpoint)
    assert of_checkpoint.result_folder == checkpoint / "adapter"
    (checkpoint / "adapter" / "adapter_model.safetensors").write_bytes(b"damaged")
    outcome = CliRunner().invoke(cli, [command, str(checkpoint), *ask])
    assert outcome.exit_code == 2 and "give another checkpoint" in outcome.output
