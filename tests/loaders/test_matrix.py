"""Loader by method by base: the same prompt, tokens and greedy answer, losses within what rounding explains.

llama.cpp must end an answer at each token at which the model's generation_config.json does.

Bounds. Two transformers read the same numbers and compute in float32: only the order of sums differs. llama.cpp rounds
what goes into each product to bf16: plain transformers in bf16 shows by how much that moves a token's loss (mean m,
spread s), and another such computation lies within |m| + 6 s / sqrt(N) of float32 on N tokens. A merged model differs
from base plus adapter by its weights' rounding to bf16, once, which is less than computing in bf16 rounds.
"""

import json
import math
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, pstdev

import pytest
from asking import MESSAGES, NEW_TOKENS, Trained, ask
from matrix import METHODS, Cell
from rounding import additions_to_logits, rounding
from transformers import AutoTokenizer, LlamaConfig

from fitune.config.json_file import read_json, write_json
from fitune.export.configs import config_for_loaders
from fitune.export.merge import merge_run

LEAVE_AN_ADAPTER = [method for method in METHODS if method != "full"]


@pytest.fixture
def compare(trained, record_property):
    """Puts a cell into the matrix, then holds the difference against its bound and the answers against each other."""

    def call(loader: str, loss: float, expected_loss: float, bound: float, answer: list | None = None, expected=None):
        answers = {} if answer is None else {"same": _same(answer, expected["answer"]), "tokens": len(answer)}
        cell = Cell(loader, trained.base_name, trained.run.recipe.method, abs(loss - expected_loss), bound, **answers)
        record_property("cell", vars(cell))
        assert loss == pytest.approx(expected_loss, abs=bound)
        if answer is not None:
            assert_same_answer(answer, expected, 2 * bound)

    return call


def _same(one: list, other: list) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def assert_same_answer(answer: list, expected: dict, gap: float) -> None:
    """Or they part where the two likeliest tokens are closer than `gap`."""
    pairs = zip(answer, expected["answer"], expected["gaps"], strict=False)
    parted = next((between for one, other, between in pairs if one != other), 0.0)
    assert parted <= gap, (answer, expected["answer"], expected["gaps"])


def assert_asked_alike(found: dict, expected: dict, keys: tuple[str, ...] = ("prompt", "ids", "stop")) -> None:
    for key in keys:
        assert found[key] == expected[key], key


def of_float32(trained: Trained) -> float:
    config = LlamaConfig.from_pretrained(trained.merged)
    size = max(map(abs, trained.now["losses"]))
    return rounding(additions_to_logits(config, len(trained.now["ids"]))) * size


def of_bf16(trained: Trained, first: int = 0) -> float:
    """Of the mean loss of the prompt's tokens from `first` on."""
    pairs = zip(trained.now_bf16["losses"][first:], trained.now["losses"][first:], strict=True)
    off = [a - b for a, b in pairs]
    return abs(mean(off)) + 6 * pstdev(off) / math.sqrt(len(off))


def test_transformers_4_reads_merged_models_as_5_does(trained, other_python, compare):
    found, now = trained.ask_transformers(other_python, trained.merged), trained.now
    assert found["transformers"].startswith("4.57.") and now["transformers"].startswith("5.")
    assert_asked_alike(found, now)
    loader = f"transformers {found['transformers']}"
    compare(loader, mean(found["losses"]), mean(now["losses"]), of_float32(trained), found["answer"], now)


@pytest.mark.parametrize("method", LEAVE_AN_ADAPTER)
def test_peft_finds_base_and_adapter(trained, compare, tmp_path):
    """The base as it is stored: a QLoRA run's adapter too, which `merge --onto original` adds to it.

    PEFT takes the tokens at which an answer ends from the base, which need not know the trained end of turn.
    """
    found, merged = trained.ask_transformers(sys.executable, trained.run.result_folder), trained.merged
    if trained.run.recipe.method == "qlora":
        merged = merge_run(trained.run, tmp_path / "merged", onto="original")
    expected = trained.ask_transformers(sys.executable, merged)
    assert_asked_alike(found, expected, ("prompt", "ids"))
    loader = f"PEFT, transformers {found['transformers']}"
    compare(loader, mean(found["losses"]), mean(expected["losses"]), of_bf16(trained), found["answer"], expected)


@pytest.mark.parametrize("method", LEAVE_AN_ADAPTER)
def test_peft_on_transformers_4_finds_them_as_on_5(trained, other_python, compare):
    now, found = (trained.ask_transformers(p, trained.run.result_folder) for p in (sys.executable, other_python))
    if trained.base_name == "real":
        found = read_with_rope_theta(trained, other_python, found)
    assert_asked_alike(found, now)
    loader = f"PEFT, transformers {found['transformers']}"
    compare(loader, mean(found["losses"]), mean(now["losses"]), of_float32(trained), found["answer"], now)


def read_with_rope_theta(trained: Trained, other_python, found: dict) -> dict:
    """What transformers 4.57 makes of an adapter once its base names `rope_theta`; `found` is what it made without.

    That must be what follows from 10000, its default: the base's config.json alone is to blame.
    """
    adapter, base = trained.run.result_folder, Path(trained.run.recipe.base.model)
    config = read_json(base / "config.json", "")
    default = {"rope_type": "default", "rope_theta": 10000.0}
    with config_json(base, config | {"rope_parameters": default}):
        expected = trained.ask_transformers(sys.executable, adapter)
    assert_asked_alike(found, expected)
    assert mean(found["losses"]) == pytest.approx(mean(expected["losses"]), abs=of_float32(trained))
    assert_same_answer(found["answer"], expected, 2 * of_float32(trained))
    with config_json(base, config_for_loaders(config, config["dtype"])):
        return trained.ask_transformers(other_python, adapter)


@contextmanager
def config_json(folder: Path, config: dict):
    before = read_json(folder / "config.json", "")
    write_json(folder / "config.json", config)
    yield
    write_json(folder / "config.json", before)


@pytest.mark.parametrize("kind", ["bf16", "f16", "q8_0"])
def test_llama_cpp_answers_as_transformers_does(trained, other_python, kind, compare):
    file, now = trained.gguf(kind), trained.now
    ends = [*as_list(now["stop"]), now["ids"][-1]]  # the last one is no end
    question = {"messages": MESSAGES, "ids": now["ids"], "new_tokens": NEW_TOKENS, "ends": ends}
    found = ask(other_python, "ask_llama_cpp.py", file, **question)
    # q8_0 rounds weights to 1/127 of the largest of 32, four times as much as bf16 rounds what it multiplies
    bound = of_bf16(trained) * (4 if kind == "q8_0" else 1)
    answer = AutoTokenizer.from_pretrained(trained.merged).encode(found["text"], add_special_tokens=False)
    compare(f"llama.cpp, {kind}", mean(found["losses"]), mean(now["losses"]), bound, answer, now)
    assert found["ends"] == ["stop"] * len(as_list(now["stop"])) + ["length"]


def as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def test_eval_of_a_gguf_is_evals_of_its_model(trained, prepared, tmp_path, compare):
    """The same rows by llama.cpp's tokenizer and template, and losses that differ as computing in bf16 explains.

    The last row has characters of several tokens, of whose first ones llama.cpp says nothing.
    """
    rows = tmp_path / "rows.jsonl"
    characters = {"messages": [*MESSAGES, {"role": "assistant", "content": "Paris 🦙 𒀀"}]}
    rows.write_text((prepared / "test.jsonl").read_text().splitlines()[0] + "\n" + json.dumps(characters) + "\n")
    (tokens, loss), (expected_tokens, expected_loss) = (
        re.search(r"answer tokens: (\d+).*model\D*([\d.]+)", fitune("eval", given, "--data", rows), re.S).groups()
        for given in (trained.gguf("bf16"), trained.merged)
    )
    assert tokens == expected_tokens
    compare("fitune eval of the GGUF", float(loss), float(expected_loss), of_bf16(trained) + 1e-4)


TASK = """\
task: question
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{before}}}}"
doc_to_target: "{{{{after}}}}"
target_delimiter: ""
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
"""


def test_lm_eval_measures_the_merged_model(trained, python_with_lm_eval, tmp_path, compare):
    """A task from local files: how likely the question is after what the template writes before it.

    The perplexity of its only row is exp of the sum of its tokens' losses.
    """
    prompt, rows, answer = trained.now["prompt"], tmp_path / "rows.jsonl", tmp_path / "answer.json"
    before, after = prompt[: prompt.rindex("user")], prompt[prompt.rindex("user") :]  # a special token lies between
    rows.write_text(json.dumps({"before": before, "after": after}) + "\n")
    (tmp_path / "question.yaml").write_text(TASK.format(rows=rows))
    words = ["eval", trained.run.folder, "--tasks", "question", "--include", tmp_path, "--json", answer]
    fitune(*words, python=python_with_lm_eval)
    tokenizer = AutoTokenizer.from_pretrained(trained.merged)
    first = len(tokenizer.encode(before, add_special_tokens=False)) - 1  # the prompt's first token has no loss
    expected = trained.now["losses"][first:]
    loss = math.log(json.loads(answer.read_text())["question"]["perplexity"]) / len(expected)
    compare("lm-eval, bf16", loss, mean(expected), of_bf16(trained, first))
    assert not list(trained.run.folder.parent.glob(".fitune-tasks-*"))


def fitune(*words, python: Path | str = sys.executable) -> str:
    """What the command prints."""
    command = [str(python), "-m", "fitune", *map(str, words)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
