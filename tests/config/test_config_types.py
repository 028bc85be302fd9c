"""A wrong value in a base's config.json is one line, which names file and key, whichever command reads it first."""

import json
import shutil
from contextlib import suppress

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from fitune.cli import cli
from fitune.config.base_model import ARCHITECTURES, check_config, check_sizes
from fitune.config.config_types import KINDS, SHAPES, heads_of
from fitune.errors import UsageError

COUNT = "expected a whole number above 0"


@pytest.fixture
def good(tiny_base) -> dict:
    return json.loads((tiny_base / "config.json").read_text())


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("num_hidden_layers", "four", f"num_hidden_layers is 'four', {COUNT};"),
        ("hidden_size", [128], rf"hidden_size is \[128\], {COUNT};"),
        ("num_attention_heads", -8, f"num_attention_heads is -8, {COUNT};"),
        ("intermediate_size", 0, f"intermediate_size is 0, {COUNT};"),
        ("max_position_embeddings", 8192.0, f"max_position_embeddings is 8192.0, {COUNT};"),
        ("vocab_size", None, f"vocab_size is None, {COUNT};"),
        ("head_dim", True, "head_dim is True, expected an even whole number above 0, or null;"),
        ("head_dim", 15, "head_dim is 15, expected an even whole number above 0, or null;"),
        ("rms_norm_eps", "1e-5", "rms_norm_eps is '1e-5', expected a number above 0;"),
        ("tie_word_embeddings", "yes", "tie_word_embeddings is 'yes', expected true or false;"),
        ("eos_token_id", ["<|end|>"], "eos_token_id is .*, expected a token's id, or a list of them, or null;"),
        ("rope_parameters", [1], r"rope_parameters is \[1\], expected an object, or null;"),
        ("rope_parameters", {"rope_theta": "x"}, "rope_parameters.rope_theta is 'x', expected a number above 0;"),
        ("model_type", ["llama"], r"model_type is \['llama'\], expected a text, or null;"),
    ],
)
def test_a_value_of_a_wrong_kind_is_named(good, tmp_path, key, value, said):
    where = tmp_path / "config.json"
    for check in (check_config, check_sizes):
        check(good, where)
        with pytest.raises(UsageError, match=f"^{where}: {said}"):
            check(good | {key: value}, where)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, r"num_attention_heads is 6, expected a .* \(4\);"),
        (
            {"hidden_size": 66, "head_dim": None},
            r"hidden_size is 66, expected a multiple of num_attention_heads \(4\);",
        ),
        ({"hidden_size": 66, "head_dim": 16}, r"hidden_size is 66, expected a multiple of num_attention_heads \(4\);"),
        ({"model_type": "mistral", "hidden_size": 66, "head_dim": None}, "hidden_size is 66, "),
        ({"model_type": "qwen2", "num_key_value_heads": 3}, r"num_attention_heads is 4, .* num_key_value_heads \(3\);"),
        (
            {"hidden_size": 60, "head_dim": None},
            "hidden_size 60 gives each of num_attention_heads 4 15 numbers, expected an even number;",
        ),
    ],
)
def test_heads_that_do_not_divide_what_they_share_are_refused(good, tmp_path, sizes, said):
    for check in (check_config, check_sizes):
        with pytest.raises(UsageError, match=f"config.json: {said}.* correct it, or get the model again$"):
            check(good | {"num_attention_heads": 4, "num_key_value_heads": 2} | sizes, tmp_path / "config.json")


def test_heads_that_are_not_given_are_those_that_transformers_takes(good, tmp_path):
    classes = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    sizes = {"hidden_size": 256, "num_attention_heads": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    for kind, config in classes.items():
        here = {"model_type": kind, **sizes, "vocab_size": 100, "max_position_embeddings": 64}
        check_config(here, tmp_path / "config.json")
        theirs, ours = config(**sizes), heads_of(here)
        assert ours.key_value == theirs.num_key_value_heads
        assert ours.dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    few = {"model_type": "mistral", **sizes, "num_attention_heads": 4}
    with pytest.raises(UsageError, match=r"num_attention_heads is 4, .* \(8 where it is not given\)"):
        check_config(few, tmp_path / "config.json")


def test_heads_of_a_size_of_their_own_need_not_share_the_hidden_size(good, tmp_path):
    for kind in ("mistral", "qwen2", "qwen3"):
        check_config(good | {"model_type": kind, "hidden_size": 66, "head_dim": 16}, tmp_path / "config.json")
    of_qwen3 = {key: value for key, value in good.items() if key != "head_dim"} | {"model_type": "qwen3"}
    check_config(of_qwen3 | {"hidden_size": 66}, tmp_path / "config.json")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_null_is_refused_where_transformers_refuses_it(kind, good, tmp_path):
    where = tmp_path / "config.json"
    sizes = {key: good[key] for key in (*SHAPES, "num_key_value_heads", "max_position_embeddings")}

    def taken_here() -> bool:
        with suppress(UsageError):
            check_config(config, where)
            return True
        return False

    def taken_by_transformers() -> bool:
        with suppress(Exception), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
            return model.config.model_type == kind
        return False

    for key in KINDS:
        config = {"model_type": kind} | sizes | {key: None}
        where.write_text(json.dumps(config))
        assert taken_here() == taken_by_transformers(), key


def test_a_mistral_that_transformers_takes_for_another_is_refused(good, tmp_path):
    config = good | {"model_type": "mistral", "layer_types": ["full_attention"] * good["num_hidden_layers"]}
    with pytest.raises(UsageError, match=r"config\.json: a ministral model; fitune trains these only: "):
        check_config(config, tmp_path / "config.json")


def test_the_base_of_rotary_positions_may_be_null_where_a_block_has_it(good, tmp_path):
    config = {key: value for key, value in good.items() if key != "rope_parameters"} | {"rope_theta": None}
    check_config(config | {"rope_parameters": {"rope_theta": 1e4}}, tmp_path / "config.json")
    with pytest.raises(UsageError, match=r"config\.json: rope_theta is None, expected a number above 0;"):
        check_config(config, tmp_path / "config.json")


@pytest.mark.parametrize("key", SHAPES)
def test_a_missing_size_is_named(good, tmp_path, key):
    with pytest.raises(UsageError, match=f"config.json: key '{key}' is missing"):
        check_sizes({name: value for name, value in good.items() if name != key}, tmp_path / "config.json")


def test_other_architectures_may_hold_other_kinds(tmp_path):
    check_sizes({"model_type": "gemma3n", "intermediate_size": [1, 2]}, tmp_path / "config.json")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"num_hidden_layers": "four"}, "num_hidden_layers is 'four', expected a whole number above 0"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4, expected a multiple of num_key_value_heads (3)"),
    ],
)
@pytest.mark.parametrize(
    "words",
    [
        ["plan", "tiny_qlora", "--profile", "cpu_2proc", "--set"],
        ["plan"],
        ["prepare", "tiny_qlora", "--output", "data", "--set"],
        ["train", "tiny_qlora", "--profile", "cpu_2proc", "--output", "run", "--set"],
        ["quantize", "--output", "nf4"],
        ["generate", "--text", "Hi"],
    ],
    ids=" ".join,
)
def test_every_command_that_reads_it_says_so(good, tiny_base, tmp_path, monkeypatch, words, wrong, said):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_base, tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text(json.dumps(good | wrong))
    given = "base.model=./base" if words[-1] == "--set" else "base"
    if words[0] == "train":  # which looks for rows first
        (tmp_path / "data" / "tiny").mkdir(parents=True)
        (tmp_path / "data" / "tiny" / "report.json").write_text("{}")
    outcome = CliRunner().invoke(cli, [*words, given])
    assert outcome.exit_code == 2 and isinstance(outcome.exception, SystemExit), outcome.output
    [line] = outcome.stderr.splitlines()
    assert f"base/config.json: {said}" in line
