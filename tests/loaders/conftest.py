"""Both bases, what each method trained on them, and the interpreters that read it: `make loaders` sets this up."""

import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from asking import Trained
from bases import LLAMA_3_1_ROPE
from matrix import BASES, METHODS, Cell, matrix
from ranks import run_ranks, train_here
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from fitune.export.merge import merge_run

HERE = Path(__file__).parent
LOADERS = os.environ.get("FITUNE_LOADERS")
REAL_MODEL, LLAMA3_TOKENIZER = os.environ.get("FITUNE_REAL_MODEL"), os.environ.get("FITUNE_LLAMA3_TOKENIZER")


def pytest_collection_modifyitems(items):
    if not LOADERS:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="run by `make loaders`, which installs what reads the models"))


def pytest_terminal_summary(terminalreporter):
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    cells = [Cell(**value) for report in reports for name, value in report.user_properties if name == "cell"]
    if cells:
        terminalreporter.section("the matrix")
        terminalreporter.write_line(matrix(cells))


@pytest.fixture(scope="session")
def other_python() -> Path:
    """With transformers 4.57, PEFT and llama.cpp."""
    return Path(LOADERS).absolute() / "bin" / "python"


@pytest.fixture(scope="session")
def python_with_lm_eval() -> Path:
    """What fitune runs on, and lm-eval."""
    return Path(LOADERS).absolute() / "lm-eval" / "bin" / "python"


@pytest.fixture(scope="session")
def train_once(make_run, tmp_path_factory) -> Callable[[str, str], Trained]:
    """(base, method) -> two steps, enough to change every answer's probability."""

    @cache
    def folder_of(name: str) -> Path:
        """A Llama with its small files as Meta publishes 3.1, or the real small model, whose head is its embedding.

        transformers 5 wrote the second's config.json, so that 4.x does not find its `rope_theta`.
        """
        folder = tmp_path_factory.mktemp("base") / name
        if name == "llama":
            return _as_published(Path(LLAMA3_TOKENIZER), folder)
        return shutil.copytree(REAL_MODEL, folder)

    @cache
    def train(name: str, method: str) -> Trained:
        output = tmp_path_factory.mktemp(f"{name}-{method}")
        rate = 5e-5 if method == "full" else 1e-3
        template = "llama3" if name == "llama" else "tokenizer"
        training = {"max_steps": 2, "learning_rate": rate, "lr_scheduler_type": "constant"}
        run = make_run(folder_of(name), output / "run", method, training=training, chat_template=template)
        run_ranks(train_here, 1, run)
        return Trained(name, run, merge_run(run, output / "merged"))

    return train


@pytest.fixture(params=BASES)
def base(request) -> str:
    return request.param


@pytest.fixture(params=METHODS)
def method(request) -> str:
    return request.param


@pytest.fixture
def trained(train_once, base, method) -> Trained:
    return train_once(base, method)


def _as_published(tokenizer: Path, folder: Path) -> Path:
    """Random weights for a tokenizer, with config, tokenizer and generation config from before transformers 5."""
    encoder = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        vocab_size=len(encoder), hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=131072,
        rope_parameters=LLAMA_3_1_ROPE | {"rope_theta": 500000.0},
        tie_word_embeddings=False, bos_token_id=encoder.bos_token_id, eos_token_id=encoder.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.lm_head.weight.data *= 5  # else the first two tokens' logits are closer than rounding
    model.save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    stored = json.loads((folder / "config.json").read_text())
    del stored["rope_parameters"], stored["dtype"]
    stored |= {"rope_theta": 500000.0, "rope_scaling": LLAMA_3_1_ROPE, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(stored))
    of_tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    for key in ("backend", "is_local", "local_files_only", "pad_token", "chat_template"):
        of_tokenizer.pop(key, None)
    of_tokenizer |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(of_tokenizer))
    stop = encoder.convert_tokens_to_ids(["<|end_of_text|>", "<|eom_id|>"])
    stop = [number for number in stop if number is not None]
    generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": stop}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder
