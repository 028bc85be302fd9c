"""What training and merge leave loads everywhere: fields that older loaders need, the base's own values kept."""

import json
import shutil
from pathlib import Path

import jinja2
import pytest
import torch
from bases import LLAMA_3_1_ROPE
from jinja2.sandbox import ImmutableSandboxedEnvironment
from ranks import run_ranks, train_here
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fitune.data.chat_template import TEMPLATE_FOLDER, ChatRenderer
from fitune.export.configs import config_for_loaders
from fitune.export.merge import merge_run
from fitune.export.tokenizer_files import without_marks

SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
METHODS = ["full", "lora", "qlora"]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
CONVERSATIONS = [
    [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Hello.\n"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "Look."},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "look_up", "arguments": {"a": "ü"}}}],
        },
        {"role": "tool", "content": "found"},
        {"role": "assistant", "content": "Here."},
    ],
]


@pytest.fixture(scope="module")
def published(tiny_base, tmp_path_factory) -> Path:
    """The tiny base with its small files as Meta publishes Llama 3.1: before transformers 5."""
    folder = Path(shutil.copytree(tiny_base, tmp_path_factory.mktemp("published") / "base"))
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"], config["dtype"]
    config |= {"rope_theta": 500000.0, "rope_scaling": LLAMA_3_1_ROPE, "torch_dtype": "float32", "pretraining_tp": 1}
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "4.43.0.dev0"}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    for key in ("backend", "is_local", "local_files_only", "pad_token"):
        tokenizer.pop(key, None)
    tokenizer |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    stops = AutoTokenizer.from_pretrained(tiny_base).convert_tokens_to_ids(["<|end_of_text|>", "<|eom_id|>"])
    (folder / "generation_config.json").write_text(json.dumps(SAMPLING | {"eos_token_id": stops}))
    (folder / "LICENSE").write_text("as the base has it")
    return folder


@pytest.fixture(scope="module")
def written(published, make_run, tmp_path_factory) -> dict[str, Path]:
    """The merged folder of each method, from a run of one step."""
    folders = {}
    for method in METHODS:
        folder = tmp_path_factory.mktemp(method)
        run = make_run(published, folder / "run", method, training={"max_steps": 1, "learning_rate": 1e-2})
        run_ranks(train_here, 1, run)
        merge_run(run, folder / "merged")
        folders[method] = folder / "merged"
    return folders


@pytest.mark.parametrize("method", METHODS)
def test_the_bases_fields_survive_and_older_ones_stand_beside_newer(written, published, method):
    base, config = (json.loads((folder / "config.json").read_text()) for folder in (published, written[method]))
    dtype = "float32" if method == "full" else "bfloat16"
    changed = {"dtype": dtype, "torch_dtype": dtype, "use_cache": True}
    assert config == base | changed | {"rope_parameters": {"rope_theta": 500000.0, **LLAMA_3_1_ROPE}}
    tokenizer = json.loads((written[method] / "tokenizer_config.json").read_text())
    own = json.loads((published / "tokenizer_config.json").read_text())
    own.pop("chat_template", None)
    assert tokenizer == own | {"pad_token": "<|finetune_right_pad_id|>"}
    assert (written[method] / "LICENSE").read_text() == "as the base has it"


@pytest.mark.parametrize("method", METHODS)
def test_generation_config_keeps_the_bases_and_adds_the_trained_end_of_turn(written, published, method):
    generation = json.loads((written[method] / "generation_config.json").read_text())
    names = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    ids = AutoTokenizer.from_pretrained(published).convert_tokens_to_ids(names)
    assert generation == SAMPLING | {"eos_token_id": ids}
    assert GenerationConfig.from_pretrained(written[method]).top_p == 0.9


@pytest.mark.parametrize("method", METHODS)
def test_run_and_merged_model_have_a_card(written, published, method):
    run = written[method].parent / "run"
    for folder in (run / ("model" if method == "full" else "adapter"), written[method]):
        card = (folder / "README.md").read_text()
        assert "Last training loss: " in card and "| learning_rate | 0.01 |" in card
        assert f"Base: `{published.name}`" in card and str(published) not in card
        is_adapter = folder.name == "adapter"
        assert f"library_name: {'peft' if is_adapter else 'transformers'}\n" in card
        assert ("| LoRA r | 4 |" in card) == (method != "full")
        assert "{% generation %}" not in card and "<|start_header_id|>" in card


@pytest.mark.parametrize("method", METHODS)
def test_transformers_reads_the_same_positions_and_tokens(written, published, method):
    model, loading = AutoModelForCausalLM.from_pretrained(written[method], output_loading_info=True)
    assert not any(loading.values())
    expected = AutoModelForCausalLM.from_pretrained(published)
    assert torch.equal(model.model.rotary_emb.inv_freq, expected.model.rotary_emb.inv_freq)
    assert AutoConfig.from_pretrained(written[method]).rope_parameters["rope_theta"] == 500000.0
    text = "River stone letter <|eot_id|> ünd"
    assert AutoTokenizer.from_pretrained(written[method])(text) == AutoTokenizer.from_pretrained(published)(text)


def test_peft_finds_the_base_by_itself(written, published):
    from peft import AutoPeftModelForCausalLM

    adapter = written["lora"].parent / "run" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(published)
    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    merged = AutoModelForCausalLM.from_pretrained(written["lora"], dtype=torch.float32)
    ids = torch.tensor([[5, 77, 300, 9]])
    with torch.no_grad():
        difference = (model(ids).logits.float() - merged(ids).logits).abs().max()
    assert difference < 0.05  # the merged weights' rounding to bf16


@pytest.mark.parametrize(
    "config", [{"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, {"rope_theta": 5.0}]
)
def test_configs_of_either_age_get_the_others_fields_and_stay_as_they_are(config):
    before = json.loads(json.dumps(config))
    found = config_for_loaders(config, "bfloat16")
    assert config == before
    assert found["rope_theta"] == 5.0 and found.get("rope_scaling") is None
    assert found["rope_parameters"] == {"rope_theta": 5.0, "rope_type": "default"}


def test_a_class_that_older_versions_do_not_know_gets_its_older_name(tiny_base, make_run, tmp_path):
    """A base that transformers 5 saved."""
    run = make_run(tiny_base, tmp_path / "run", "lora", training={"max_steps": 1})
    run_ranks(train_here, 1, run)
    merge_run(run, tmp_path / "merged", check=False)
    for folder in (run.result_folder, tmp_path / "merged"):
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
        assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]
        assert not {"backend", "is_local", "local_files_only"} & set(tokenizer)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (500000.0, None)


@pytest.mark.parametrize("name", ["llama3", "plain", "chatml"])
def test_the_template_without_marks_renders_the_same_in_any_jinja(name):
    text = (TEMPLATE_FOLDER / f"{name}.jinja").read_text()
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    assert "generation %}" in text.replace("-%}", "%}")
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    plain.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    plain.globals["raise_exception"] = _raise
    marked, unmarked = ChatRenderer(text, tokens), plain.from_string(without_marks(text))
    rendered = 0
    for messages in CONVERSATIONS:
        for tools in (None, TOOLS):
            for prompt in (False, True):
                try:
                    expected = marked.text(messages, tools, prompt)
                except jinja2.TemplateError:
                    continue
                options = {"messages": messages, "tools": tools, "add_generation_prompt": prompt}
                assert unmarked.render(**options, **tokens) == expected
                rendered += 1
    assert rendered >= 4


def _raise(message):
    raise jinja2.TemplateError(message)


def test_what_is_written_has_no_marks(written):
    for folder in (*written.values(), written["lora"].parent / "run" / "adapter"):
        assert "generation %}" not in (folder / "chat_template.jinja").read_text().replace("-%}", "%}").replace(
            "add_generation_prompt %}", ""
        )


def test_a_merge_never_edits_the_bases_files(published, written):
    assert json.loads((published / "config.json").read_text())["rope_scaling"] == LLAMA_3_1_ROPE
    assert "rope_parameters" not in json.loads((published / "config.json").read_text())
