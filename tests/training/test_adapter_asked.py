"""An adapter's folder, from fitune or elsewhere, asked and measured over processes as PEFT does on one device."""

import json
import re
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from bases import base_like, make_adapter, plain_model
from click.testing import CliRunner
from peft import PeftModel
from ranks import run_ranks
from rounding import additions_to_logits, rounding
from test_model_run import PROMPTS
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoTokenizer, LlamaConfig

from fitune.cli import cli
from fitune.data.chat_template import apply_chat_template_choice
from fitune.errors import UsageError
from fitune.planning.asking import Holding
from fitune.planning.limits import given_machine
from fitune.training.distributed import is_main_process
from fitune.training.evaluate_folder import evaluate_folder, tokenise
from fitune.training.evaluate_model import evaluate_model
from fitune.training.generate_model import generate_over_processes
from fitune.training.given_model import given_model
from fitune.training.model_run import how_to_hold, run_to_ask
from fitune.weights.base_identity import BaseRecord, base_fingerprint, write_base_record
from fitune.weights.safetensors_files import Checkpoint

TOKENS = [7, 3, 11]  # not in order: rows follow the list
KINDS = {
    "plain": {},
    "rsLoRA": {"r": 5, "use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 7, r"layers\.1\.mlp\.down_proj": 2},
        "alpha_pattern": {"v_proj": 3, "gate_proj": 32},
    },
    "some layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "trained tokens": {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS}},
}
NOT_HELD = {
    "DoRA": {"use_dora": True},
    "LoRA on embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "the embedding or the head alone": {"trainable_token_indices": {"embed_tokens": TOKENS}},
}


@pytest.fixture(scope="module")
def model(uneven_base, tmp_path_factory) -> Path:
    """In float32, in which processes on the CPU compute, so that only the order of sums differs."""
    folder, tokenizer = tmp_path_factory.mktemp("base") / "model", tiny_tokenizer()
    plain_model(uneven_base).save_pretrained(folder)
    apply_chat_template_choice(tokenizer, "llama3")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make(model, tmp_path_factory):
    """An adapter of a kind, made once."""
    made = {}

    def adapter(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_adapter(model, tmp_path_factory.mktemp("adapter"), **(KINDS | NOT_HELD)[kind])
        return made[kind]

    return adapter


def held(adapter: Path, folder: Path, load: str, ranks: int, offload: bool):
    """As on GPUs, on CPU processes."""
    folder.mkdir()
    run = run_to_ask(given_model(adapter), Holding(load, ranks, offload, 1.0, 1.0), folder)
    accelerate = run.accelerate.model_copy(update={"use_cpu": True, "mixed_precision": "no"})
    return run.model_copy(update={"accelerate": accelerate})


def ask(run) -> list[dict]:
    file = run.folder / "answers.json"
    options = {"prompt": PROMPTS, "text": [], "chat": False, "max_new_tokens": 8, "json": file}
    generate_over_processes(run, Namespace(**options, temperature=0.0, seed=None))
    return json.loads(file.read_text()) if is_main_process() else []


def plain_answers(folder: Path, adapter: Path, method: str) -> list[dict]:
    """Base and tuned by transformers and PEFT in float32."""
    tokenizer, tuned = (
        AutoTokenizer.from_pretrained(folder),
        PeftModel.from_pretrained(plain_model(folder, method), adapter),
    )
    rows = []
    for prompt in PROMPTS:
        asked = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)

        def said(ids=ids) -> str:
            with torch.no_grad():
                output = tuned.eval().generate(**ids, max_new_tokens=8, do_sample=False)
            return tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()

        with tuned.disable_adapter():
            base = said()
        rows.append({"base": base, "tuned": said()})
    return rows


WAYS = [("stored", 2, False), ("nf4", 1, False), ("nf4", 2, True)]


@pytest.mark.parametrize(("kind", "way"), [*(("plain", way) for way in WAYS), *((k, WAYS[0]) for k in [*KINDS][1:])])
def test_answers_of_base_and_adapter_are_plain_pefts(model, make, tmp_path, kind, way):
    expected = plain_answers(model, make(kind), "qlora" if way[0] == "nf4" else "full")
    assert any(row["base"] != row["tuned"] for row in expected)
    found = run_ranks(ask, way[1], held(make(kind), tmp_path / "run", *way))[0]
    assert [{"base": row["base"], "tuned": row["tuned"]} for row in found] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_measured_over_ranks_as_on_one_device(model, make, prepared, tmp_path, kind):
    run = held(make(kind), tmp_path / "run", "stored", 2, False)
    tokens = tokenise(prepared / "test.jsonl", given_model(make(kind)), run.folder)
    found = run_ranks(evaluate_model, 2, run, tokens.path)
    expected = evaluate_folder(given_model(make(kind)), prepared)["model"]
    assert found[0] == found[1] and found[0]["model"]["tokens"] == expected["tokens"]
    error = rounding(additions_to_logits(LlamaConfig.from_pretrained(model), 256))
    assert found[0]["model"]["loss"] == pytest.approx(expected["loss"], rel=error)


@pytest.mark.parametrize("kind", NOT_HELD)
def test_what_processes_cannot_hold_goes_to_one_device_or_is_refused(make, monkeypatch, kind):
    given = given_model(make(kind))
    monkeypatch.setattr("fitune.planning.hardware.found_here", lambda: given_machine(1, 40, 64))
    assert how_to_hold(given, "auto") is None
    for load, gpu_gib in (("nf4", 40), ("auto", 1.31)):  # the second does not hold it
        monkeypatch.setattr("fitune.planning.hardware.found_here", lambda gib=gpu_gib: given_machine(2, gib, 64))
        with pytest.raises(UsageError, match=f"{kind}.* on one device only, .*: merge it|too large to ask here"):
            how_to_hold(given, load)


def test_trained_biases_stay_on_one_device_and_the_base_is_not_asked_with_them(uneven_base, prepared, tmp_path, capfd):
    base = base_like(uneven_base, tmp_path / "base", torch.float32, model_type="qwen2")
    tokenizer = tiny_tokenizer()
    apply_chat_template_choice(tokenizer, "llama3")
    tokenizer.save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter", bias="all")
    refused = CliRunner().invoke(cli, ["eval", str(adapter), "--data", str(prepared), "--load", "nf4"])
    assert refused.exit_code == 2 and "trained biases can be asked on one device only" in refused.stderr
    asked = ["generate", str(adapter), "--prompt", PROMPTS[0], "--max-new-tokens", "8", "--json", tmp_path / "a.json"]
    result = CliRunner().invoke(cli, [*map(str, asked)])
    assert result.exit_code == 0, result.output + capfd.readouterr().err
    assert f"trained biases of the base, so this one is not asked: {base}" in result.stderr + capfd.readouterr().err
    [answers] = json.loads((tmp_path / "a.json").read_text())
    assert "base" not in answers and answers["tuned"] == plain_answers(base, adapter, "full")[0]["tuned"]


def test_an_adapter_trained_beside_nf4_is_asked_beside_nf4(model, make, prepared, tmp_path, capfd, quick_ranks):
    """By the real `eval` and `generate`; the figure is that of the weights that NF4 stands for."""
    adapter = Path(shutil.copytree(make("plain"), tmp_path / "adapter"))
    with Checkpoint(model) as checkpoint:
        record = BaseRecord(str(model), None, base_fingerprint(checkpoint), computed_in="nf4")
    write_base_record(adapter, record)
    through_nf4 = tmp_path / "through_nf4"
    plain_model(model, "qlora").save_pretrained(through_nf4)
    AutoTokenizer.from_pretrained(model).save_pretrained(through_nf4)
    elsewhere = Path(shutil.copytree(make("plain"), tmp_path / "elsewhere"))
    config = json.loads((elsewhere / "adapter_config.json").read_text())
    (elsewhere / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(through_nf4)}))
    expected = evaluate_folder(given_model(elsewhere), prepared)["model"]["loss"]
    stored = evaluate_folder(given_model(make("plain")), prepared)["model"]["loss"]
    assert abs(expected - stored) > 1e-3
    result = CliRunner().invoke(cli, ["eval", str(adapter), "--data", str(prepared)])
    printed = capfd.readouterr()
    assert result.exit_code == 0, result.output + printed.err
    assert f"{adapter}: weights in NF4, on the CPU" in result.stderr + printed.err
    assert f"{expected:.4f}" in printed.out
    asked = ["generate", str(adapter), "--prompt", PROMPTS[0], "--max-new-tokens", "8", "--json", tmp_path / "a.json"]
    assert CliRunner().invoke(cli, [*map(str, asked)]).exit_code == 0
    [answers] = json.loads((tmp_path / "a.json").read_text())
    assert {key: answers[key] for key in ("base", "tuned")} == plain_answers(model, adapter, "qlora")[0]


def test_an_adapter_of_another_base_is_refused_before_anything_is_loaded(make, uneven_base, tmp_path):
    other = base_like(uneven_base, tmp_path / "other", hidden_size=192)
    adapter = Path(shutil.copytree(make("plain"), tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(other)}))
    result = CliRunner().invoke(cli, ["generate", str(adapter), "--prompt", "Hi"])
    assert result.exit_code == 2 and "wrong base?" in result.stderr and result.stderr.count("\n") <= 2


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"r": 5}, "size mismatch for .*lora_A"),
        ({"peft_type": "LORAX"}, "LORAX"),
        ({"use_dora": True}, "lacks .*lora_magnitude_vector.* and 13 more, which adapter_config.json asks for"),
        ({"peft_type": "IA3", "feedforward_modules": []}, "lacks .*ia3_l.* and 13 more, which"),
    ],
    ids=["another rank", "a kind of adapter that there is not", "DoRA without magnitudes", "another kind's tensors"],
)
def test_an_adapter_that_is_not_as_its_config_says_is_refused_in_one_line(make, tmp_path, changed, said):
    adapter = Path(shutil.copytree(make("plain"), tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | changed))
    result = CliRunner().invoke(cli, ["generate", str(adapter), "--text", "Once"])
    assert result.exit_code == 2, result.output
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(f"{adapter}: PEFT cannot load it: .*{said}", line)
    assert "Traceback" not in result.stderr and result.stderr.endswith(f"{line}\n")
