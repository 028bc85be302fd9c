"""`generate --serve`: the line that serves each kind of result, started where the program is installed."""

import json
import os

import pytest
from adapters import set_values
from bases import make_adapter
from click.testing import CliRunner

from fitune.cli import cli
from fitune.config.adapter_folder import BASE_RECORD
from fitune.errors import UsageError
from fitune.export.adapter import AdapterFile
from fitune.export.adapter_servers import SGLANG, VLLM, what_lacks
from fitune.export.serve import notes_on, serve, server_command


def test_a_models_folder_is_served_by_vllm_and_a_gguf_by_llama_cpp(base, tmp_path):
    assert server_command(base, None, 8000) == ["vllm", "serve", str(base), "--port", "8000"]
    for name, size in (("mine-bf16.gguf", 9), ("mine-Q4_K_M.gguf", 3)):
        (tmp_path / name).write_bytes(b"x" * size)
    smallest = ["llama-server", "--model", str(tmp_path / "mine-Q4_K_M.gguf"), "--jinja", "--port", "8000"]
    assert server_command(tmp_path, None, 8000) == smallest
    assert server_command(tmp_path / "mine-bf16.gguf", None, 80)[2] == str(tmp_path / "mine-bf16.gguf")
    with pytest.raises(UsageError, match="neither a run, an adapter"):
        server_command(tmp_path / "nothing", None, 80)


def test_a_plain_adapter_is_added_by_vllm_to_its_base(base, tmp_path):
    own_adapter = make_adapter(base, tmp_path / "plain", r=20)
    set_values(own_adapter / "adapter_config.json", base_model_name_or_path="org/base", revision="abc")
    (own_adapter / "chat_template.jinja").write_text("x")
    expected = (
        f"vllm serve org/base --revision abc --enable-lora --lora-modules tuned={own_adapter} --max-lora-rank 32 "
    )
    expected += f"--chat-template {own_adapter / 'chat_template.jinja'} --port 8000"
    assert server_command(own_adapter, None, 8000) == expected.split()


@pytest.mark.parametrize(
    ("computed_in", "stored", "said"), [("nf4", "bf16", True), ("nf4", "nf4", False), ("stored", "bf16", False)]
)
def test_an_adapter_that_nf4_was_trained_beside_is_not_served_beside_it_which_is_said(
    base, tmp_path, computed_in, stored, said
):
    own_adapter, own_base = make_adapter(base, tmp_path / "plain"), tmp_path / "base"
    own_base.mkdir()
    in_four_bits = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (own_base / "config.json").write_text(json.dumps(in_four_bits if stored == "nf4" else {}))
    set_values(own_adapter / "adapter_config.json", base_model_name_or_path=str(own_base))
    assert notes_on(own_adapter, None) == notes_on(base, None) == []
    (own_adapter / BASE_RECORD).write_text(json.dumps({"computed_in": computed_in}))
    printed = CliRunner().invoke(cli, ["generate", str(own_adapter), "--serve", "8000"]).stderr
    assert ("trained, and measured, beside weights in NF4, and is served on the base's own" in printed) is said


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"trainable_token_indices": [1]}, "trainable_token_indices: merge it"),
        ({"use_dora": True}, "use_dora: merge it"),
        ({"rank_pattern": {"q_proj": 6}}, "rank_pattern: merge it"),
        ({"alpha_pattern": {"q_proj": 6}}, "alpha_pattern: merge it"),
        ({"bias": "lora_only"}, "bias lora_only: merge it"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base; convert it"),
        ({"base_model_name_or_path": None}, "names no base; merge it with --base MODEL"),
    ],
    ids=["tokens", "dora", "ranks", "alphas", "bias", "biases", "pissa", "base"],
)
def test_what_vllm_does_not_add_must_be_merged(base, tmp_path, changed, said):
    own_adapter = make_adapter(base, tmp_path / "plain")
    set_values(own_adapter / "adapter_config.json", **changed)
    with pytest.raises(UsageError, match=said):
        server_command(own_adapter, None, 8000)


def test_an_adapter_of_a_rank_beyond_vllms_must_be_merged(base, tmp_path):
    with pytest.raises(UsageError, match="up to rank 512, this has 513: merge it"):
        server_command(make_adapter(base, tmp_path / "plain", r=513, target_modules=["q_proj"]), None, 8000)


def lacks(adapter, server: str) -> str:
    with AdapterFile(adapter) as file:
        return what_lacks(server, file)


@pytest.mark.parametrize(
    "changed",
    [
        {"trainable_token_indices": [1]},
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 6}},
        {"alpha_pattern": {"q_proj": 6}},
        {"bias": "lora_only"},
    ],
    ids=str,
)
def test_what_neither_server_takes(base, tmp_path, changed):
    own_adapter = make_adapter(base, tmp_path / "plain")
    assert lacks(own_adapter, VLLM) == lacks(own_adapter, SGLANG) == ""
    set_values(own_adapter / "adapter_config.json", **changed)
    assert lacks(own_adapter, VLLM) == lacks(own_adapter, SGLANG) != ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_rslora": True}, "no adapter with use_rslora, as it scales by alpha / r"),
        ({"target_modules": r".*\.(q_proj|v_proj)"}, "no adapter with an expression for target_modules"),
        ({"target_modules": ["q_proj"]}, "no adapter with q_proj and no v_proj"),
        ({"target_modules": ["q_proj", "k_proj"]}, "no adapter with q_proj and no v_proj"),
        ({"target_modules": ["v_proj", "o_proj"]}, "no adapter with v_proj and no q_proj"),
        ({"target_modules": ["up_proj", "down_proj"]}, "no adapter with up_proj and no gate_proj"),
        ({"target_modules": ["q_proj", "v_proj"]}, ""),
        ({"target_modules": ["gate_proj", "o_proj"]}, ""),
        ({"target_modules": ["embed_tokens", "lm_head"]}, ""),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_sglang_alone_does_not_take_is_a_note(base, tmp_path, options, said):
    own_adapter = make_adapter(base, tmp_path / "plain", **options)
    assert lacks(own_adapter, VLLM) == "" and lacks(own_adapter, SGLANG) == said
    printed = CliRunner().invoke(cli, ["generate", str(own_adapter), "--serve", "8000"])
    assert printed.exit_code == 0 and printed.stdout.startswith("vllm serve ")
    assert (f"note: SGLang takes {said}: for SGLang merge it" in printed.stderr) is bool(said)


def test_sglang_takes_any_rank(base, tmp_path):
    of_high_rank = make_adapter(base, tmp_path / "plain", r=513, target_modules=["o_proj"])
    assert lacks(of_high_rank, SGLANG) == "" and "up to rank 512" in lacks(of_high_rank, VLLM)


def test_it_is_started_where_it_is_installed_and_else_said(base, tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(os, "execv", lambda program, words: started.append((program, words)))
    monkeypatch.setenv("PATH", str(tmp_path))
    command = ["vllm", "serve", "a folder", "--port", "80"]
    serve(command)
    said = capsys.readouterr()
    assert said.out == "vllm serve 'a folder' --port 80\n" and "pip install vllm" in said.err and not started
    (tmp_path / "vllm").write_text("#!/bin/sh\n")
    (tmp_path / "vllm").chmod(0o755)
    serve(command)
    assert started == [(str(tmp_path / "vllm"), command)]


def test_the_command_line(base, monkeypatch):
    monkeypatch.setenv("PATH", "")
    outcome = CliRunner().invoke(cli, ["generate", str(base), "--serve", "8000"])
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stdout == f"vllm serve {base} --port 8000\n"
    refused = CliRunner().invoke(cli, ["generate", str(base), "--serve", "8000", "--chat"])
    assert refused.exit_code == 2 and "--serve" in refused.stderr
