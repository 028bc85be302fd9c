"""The check of a GGUF: right files lie within the bound, wrong ones beyond it. Transformers answers for llama.cpp.

`make loaders` asks the real one.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from adapters import set_values
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fitune.errors import FituneError
from fitune.export import check_gguf as checking
from fitune.export.check_gguf import check_gguf, compare_gguf, round_to
from fitune.export.gguf_answers import LIKELIEST, ask_gguf, likeliest
from fitune.export.prompts import prompts_for

FILE = Path("mine.gguf")
NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """With matrices large enough that layers and rotation count."""
    from fitune.demo.tiny_base import build_tiny_base

    folder = build_tiny_base(tmp_path_factory.mktemp("base") / "base", num_layers=2)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor * (8 if tensor.dim() == 2 and "layers" in name else 1) for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


class LlamaCpp:
    """Answers of a folder in float32, its matrices rounded to q8_0 by llama.cpp's formula where asked for."""

    def __init__(self, folder: Path, kind: str = "bf16"):
        self.asked = []
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for weight in self.model.parameters() if kind == "q8_0" else ():
            if weight.dim() == 2:
                blocks = weight.data.view(-1, 32)
                scale = blocks.abs().amax(1, keepdim=True) / 127
                weight.data = ((blocks / scale).round() * scale).view(weight.shape)

    @torch.no_grad()
    def __call__(self, path: str, request: dict) -> dict:
        assert path == "/completion"
        self.asked.append(request)
        found = self.model(torch.tensor([request["prompt"]])).logits[0, -1].log_softmax(-1).topk(request["n_probs"])
        tokens = [{"id": int(token), "logprob": float(value)} for value, token in zip(*found, strict=True)]
        return {"completion_probabilities": [{"top_logprobs": tokens}]}

    def ask(self, file: Path, beginnings: list[list[int]]):
        return likeliest(beginnings, self)


def prompts(model) -> list[list[int]]:
    return prompts_for(model, None, 2048)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_a_right_file_is_within_the_bound(model, kind):
    llama_cpp = LlamaCpp(model, kind)
    found = compare_gguf(FILE, kind, model, prompts(model), llama_cpp.ask)
    assert found.mean_difference < found.bound
    assert found.largest_difference >= found.mean_difference
    assert found.places == len(llama_cpp.asked) > 16 and found.prompts == 4
    assert found.same_next_token >= found.places - 1
    whole = [request["prompt"] for request in llama_cpp.asked]
    assert all(prompt in whole for prompt in prompts(model)), "each prompt to its end"


def test_float32_differs_by_the_order_of_sums_alone(model):
    """The reference is what plain transformers computes."""
    found = compare_gguf(FILE, "f16", model, prompts(model), LlamaCpp(model).ask)
    assert found.largest_difference < 1e-3 and found.same_next_token == found.places


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
@pytest.mark.parametrize("damage", ["another rope base", "two layers exchanged", "a matrix in another order", "NaN"])
def test_a_wrong_file_is_refused(model, tmp_path, monkeypatch, damage, kind):
    folder = Path(shutil.copytree(model, tmp_path / "damaged"))
    tensors = load_file(folder / "model.safetensors")
    if damage == "another rope base":
        rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
        set_values(folder / "config.json", rope_parameters=rope | {"rope_theta": 100.0})
    elif damage == "two layers exchanged":
        order = str.maketrans("01", "10")
        tensors = {n.translate(order) if ".layers." in n else n: tensor for n, tensor in tensors.items()}
    else:
        tensors[NAME] = tensors[NAME].flip(0) if damage != "NaN" else tensors[NAME] * math.nan
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(checking, "is_installed", lambda: True)
    monkeypatch.setattr(checking, "ask_gguf", LlamaCpp(folder, kind).ask)
    with pytest.raises(FituneError, match=r"mine.gguf: 4 prompts: .* \(bound .*not the model that was converted"):
        check_gguf({FILE: kind}, model)


@pytest.mark.parametrize("kind", ["q2_k", "q3_k_m", "q4_k_m"])
def test_answers_to_something_else_are_refused_however_few_the_bits(model, kind):
    """In 2 bits this model is gone, so that eight times what rounding to them does would allow anything."""
    right = LlamaCpp(model)
    found = compare_gguf(FILE, kind, model, prompts(model), right.ask)
    assert found.mean_difference < found.bound / 10
    found = compare_gguf(FILE, kind, model, prompts(model), lambda file, asked: right.ask(file, [*asked[1:], asked[0]]))
    assert found.mean_difference > found.bound


def test_tokens_of_another_vocabulary_are_refused(model):
    def ask(file, beginnings):
        return [[(2048 + 7, -0.1)] for _ in beginnings]

    with pytest.raises(FituneError, match="no tokens of the model's vocabulary"):
        compare_gguf(FILE, "f16", model, prompts(model), ask)


def test_a_number_that_is_none_counts_as_none():
    def post(path, request):
        return {"completion_probabilities": [{"top_logprobs": [{"id": 3, "logprob": None}]}]}

    [[(token, probability)]] = likeliest([[1, 2]], post)
    assert token == 3 and math.isnan(probability)


def test_where_a_character_is_likeliest_to_begin_a_letter_is_chosen_instead():
    """llama.cpp says nothing of a token that begins a character and does not end it."""

    def post(path, request):
        if path == "/tokenize":
            return {"tokens": [7]}
        if "logit_bias" not in request:
            return {"content": "\ufffd"}
        assert request["logit_bias"][0][0] == 7
        return {"completion_probabilities": [{"id": 7, "top_logprobs": [{"id": 3, "logprob": -0.5}]}]}

    assert likeliest([[1, 2]], post) == [[(3, -0.5)]]


def test_another_architecture_is_not_checked_and_this_is_said(model, tmp_path, capsys):
    folder = Path(shutil.copytree(model, tmp_path / "other"))
    set_values(folder / "config.json", model_type="gpt2")
    check_gguf({FILE: "f16"}, folder)
    assert "check: mine.gguf: not checked: a gpt2 model" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "steps"), [("q8_0", 255), ("q6_k", 64), ("q4_k_m", 16), ("iq4_xs", 16), ("q2_k", 4)])
def test_a_block_holds_as_many_values_as_its_type(kind, steps):
    """No value moves by more than half a step between the extremes of its block."""
    x = torch.randn(3, 4096, generator=torch.Generator().manual_seed(0))
    rounded = round_to(kind, x)
    blocks, of_rounded = x.view(-1, 32), rounded.view(-1, 32)
    spread = 2 * blocks.abs().amax(1) if kind == "q8_0" else blocks.amax(1) - blocks.amin(1)
    largest = (of_rounded - blocks).abs().amax(1) / spread * (steps - 1)
    assert 0.3 < largest.max() < 0.5 + 1e-3
    assert round_to(kind, torch.zeros(1, 64)).eq(0).all()


def test_the_process_that_asks_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(FituneError, match=r"the check of mine.gguf failed: .*; --no-check skips it") as caught:
        ask_gguf(FILE, [[1]])
    assert "fitune.export" not in str(caught.value), "the file is missing, or llama.cpp is; fitune is not"


def test_it_asks_for_enough_tokens():
    asked = []

    def post(path, request):
        asked.append((path, request))
        return {"completion_probabilities": [{"top_logprobs": [{"id": 0, "logprob": -1.0}]}]}

    likeliest([[5, 6]], post)
    [(path, request)] = asked
    assert (path, request["prompt"], request["n_predict"], request["n_probs"]) == ("/completion", [5, 6], 1, LIKELIEST)
