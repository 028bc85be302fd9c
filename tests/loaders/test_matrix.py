"""Loader by method by base: the same prompt, tokens and greedy answer, losses within what rounding explains.

Bounds. Two transformers read the same numbers and compute in float32: only the order of sums differs. llama.cpp rounds
what goes into each product to bf16: plain transformers in bf16 shows by how much that moves a token's loss (mean m,
spread s), and another such computation lies within |m| + 6 s / sqrt(N) of float32 on N tokens. A merged model differs
from base plus adapter by its rounding: `merge` has measured that on logits, and a loss moves by at most twice as much.
"""

import math
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, pstdev

import pytest
from asking import MESSAGES, NEW_TOKENS, Trained, ask
from rounding import additions_to_logits, rounding
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig

from fitune.config.json_file import read_json, write_json
from fitune.errors import FituneError
from fitune.export import gguf
from fitune.export.configs import config_for_loaders
from fitune.export.gguf import export_gguf
from fitune.export.merge_record import read_merge_record
from fitune.export.whole_model import whole_model


def assert_read_alike(found: dict, expected: dict, bound: float) -> None:
    for key in ("prompt", "ids", "stop"):
        assert found[key] == expected[key], key
    assert mean(found["losses"]) == pytest.approx(mean(expected["losses"]), abs=bound)
    assert_same_answer(found["answer"], expected, 2 * bound)


def assert_same_answer(answer: list, expected: dict, gap: float) -> None:
    """Or they part where the two likeliest tokens are closer than `gap`."""
    pairs = zip(answer, expected["answer"], expected["gaps"], strict=False)
    parted = next((between for one, other, between in pairs if one != other), 0.0)
    assert parted <= gap, (answer, expected["answer"], expected["gaps"])


def of_float32(trained: Trained) -> float:
    config = LlamaConfig.from_pretrained(trained.merged)
    size = max(map(abs, trained.now["losses"]))
    return rounding(additions_to_logits(config, len(trained.now["ids"]))) * size


def of_bf16(trained: Trained) -> float:
    off = [a - b for a, b in zip(trained.now_bf16["losses"], trained.now["losses"], strict=True)]
    return abs(mean(off)) + 6 * pstdev(off) / math.sqrt(len(off))


def test_transformers_4_reads_merged_models_as_5_does(trained, other_python):
    found = trained.ask_transformers(other_python, trained.merged)
    assert found["transformers"].startswith("4.57.") and trained.now["transformers"].startswith("5.")
    assert_read_alike(found, trained.now, of_float32(trained))


def test_peft_finds_base_and_adapter(trained, other_python):
    if trained.run.recipe.method == "full":
        pytest.skip("leaves no adapter")
    now, found = (trained.ask_transformers(p, trained.run.result_folder) for p in (sys.executable, other_python))
    if trained.base_name == "real":
        found = read_with_rope_theta(trained, other_python, found)
    assert_read_alike(found, now, of_float32(trained))
    if trained.run.recipe.method == "lora":  # QLoRA's adapter was added to the base through NF4
        bound = 2 * read_merge_record(trained.merged).check["bound"]
        assert mean(trained.now["losses"]) == pytest.approx(mean(now["losses"]), abs=bound)
        assert_same_answer(trained.now["answer"], now, bound)


def read_with_rope_theta(trained: Trained, other_python, found: dict) -> dict:
    """What transformers 4.57 makes of an adapter once its base names `rope_theta`; `found` is what it made without.

    That must be what follows from 10000, its default: the base's config.json alone is to blame.
    """
    adapter, base = trained.run.result_folder, Path(trained.run.recipe.base.model)
    config = read_json(base / "config.json", "")
    default = {"rope_type": "default", "rope_theta": 10000.0}
    with config_json(base, config | {"rope_parameters": default}):
        assert_read_alike(found, trained.ask_transformers(sys.executable, adapter), of_float32(trained))
    with config_json(base, config_for_loaders(config, config["dtype"])):
        return trained.ask_transformers(other_python, adapter)


@contextmanager
def config_json(folder: Path, config: dict):
    before = read_json(folder / "config.json", "")
    write_json(folder / "config.json", config)
    yield
    write_json(folder / "config.json", before)


@pytest.mark.parametrize("kind", ["bf16", "f16", "q8_0"])
def test_llama_cpp_answers_as_transformers_does(trained, other_python, tmp_path, kind, capsys):
    [file] = export_gguf(whole_model(trained.merged, None), tmp_path / "mine", kind)
    assert f"check: {file.name}: 4 prompts: log-probabilities" in capsys.readouterr().err
    question = {"messages": MESSAGES, "ids": trained.now["ids"], "new_tokens": NEW_TOKENS}
    found = ask(other_python, "ask_llama_cpp.py", file, **question)
    # q8_0 rounds weights to 1/127 of the largest of 32, four times as much as bf16 rounds what it multiplies
    bound = of_bf16(trained) * (4 if kind == "q8_0" else 1)
    assert mean(found["losses"]) == pytest.approx(mean(trained.now["losses"]), abs=bound)
    tokenizer = AutoTokenizer.from_pretrained(trained.merged)
    assert_same_answer(tokenizer.encode(found["text"], add_special_tokens=False), trained.now, 2 * bound)
    if found["text"] == trained.now["text"]:
        stops = trained.now["answer"][-1] in as_list(trained.now["stop"])
        assert found["finish"] == ("stop" if stops else "length")


@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
@pytest.mark.parametrize("damage", ["another rope base", "two layers exchanged"])
def test_a_damaged_gguf_is_refused(trained, tmp_path, monkeypatch, kind, damage):
    if (trained.base_name, trained.run.recipe.method) != ("real", "lora"):
        pytest.skip("one model is enough")
    damaged = _damaged(trained.merged, tmp_path / "damaged", damage)
    convert = gguf._convert
    monkeypatch.setattr(gguf, "_convert", lambda model, file, kind: convert(damaged, file, kind))
    with pytest.raises(FituneError, match="not the model that was converted"):
        export_gguf(whole_model(trained.merged, None), tmp_path / "mine", kind)
    assert not (tmp_path / "mine").exists()


def _damaged(model: Path, folder: Path, damage: str) -> Path:
    shutil.copytree(model, folder)
    if damage == "another rope base":
        config = read_json(folder / "config.json", "")
        rope = config["rope_parameters"] | {"rope_theta": 10000.0}
        write_json(folder / "config.json", config | {"rope_parameters": rope, "rope_theta": 10000.0})
        return folder
    [file] = folder.glob("*.safetensors")
    exchanged = {"14": "15", "15": "14"}
    renamed = {
        re.sub(r"(?<=layers\.)(14|15)(?=\.)", lambda found: exchanged[found[0]], name): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(renamed, file, metadata={"format": "pt"})
    return folder


def test_eval_of_a_gguf_is_evals_of_its_model(trained, prepared, tmp_path):
    """The same rows by llama.cpp's tokenizer and template, and losses that differ as computing in bf16 explains."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join((prepared / "test.jsonl").read_text().splitlines(keepends=True)[:2]))
    [file] = export_gguf(whole_model(trained.merged, None), tmp_path / "mine", "bf16")
    command = [sys.executable, "-m", "fitune", "eval", "--data", str(rows)]
    printed = {
        given: subprocess.run([*command, str(given)], capture_output=True, text=True)
        for given in (file, trained.merged)
    }
    found, expected = (
        re.search(r"answer tokens: (\d+).*model\D*([\d.]+)", p.stdout, re.S).groups() for p in printed.values()
    )
    assert found[0] == expected[0]
    assert float(found[1]) == pytest.approx(float(expected[1]), abs=of_bf16(trained) + 1e-4)


def as_list(value) -> list:
    return value if isinstance(value, list) else [value]
