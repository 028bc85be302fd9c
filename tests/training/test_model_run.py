"""A model's folder held by several processes, in 4 bits or out of host RAM, answers and measures as it does alone."""

import json
import re
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
from bases import plain_model
from click.testing import CliRunner
from ranks import run_ranks
from results import empty_adapter
from rounding import additions_to_logits, rounding
from safetensors.torch import load_file, save_file
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoTokenizer, LlamaConfig
from transformers.utils import logging

from fitune.cli import cli
from fitune.config import run as runs
from fitune.config.schema import Run
from fitune.data.chat_template import apply_chat_template_choice
from fitune.planning.asked_folder import asked_folder
from fitune.planning.asking import Holding, Reading, as_plain, holdings
from fitune.planning.limits import given_machine
from fitune.training.distributed import is_main_process
from fitune.training.evaluate_folder import evaluate_folder, tokenise
from fitune.training.evaluate_model import evaluate_model
from fitune.training.generate_model import generate_over_processes
from fitune.training.given_model import given_model
from fitune.training.model_run import how_to_hold, run_to_ask

PROMPTS = ["River stone letter.", "Winter garden", "Name three colours of the sky at night, please."]


@pytest.fixture(scope="module")
def model(uneven_base, tmp_path_factory) -> Path:
    """A folder as merge writes one: with a chat template, and tokens at which answers end."""
    folder = tmp_path_factory.mktemp("merged") / "model"
    shutil.copytree(uneven_base, folder)
    tokenizer = tiny_tokenizer()
    apply_chat_template_choice(tokenizer, "llama3")
    tokenizer.save_pretrained(folder)
    ends = {"eos_token_id": tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|end_of_text|>"])}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder


def held(model: Path, folder: Path, load: str, ranks: int, offload: bool) -> Run:
    """As on GPUs, on CPU processes."""
    folder.mkdir()
    run = run_to_ask(given_model(model), Holding(load, ranks, offload, 1.0, 1.0), folder)
    accelerate = run.accelerate.model_copy(update={"use_cpu": True, "mixed_precision": "no"})
    return run.model_copy(update={"accelerate": accelerate})


def ask(run: Run, temperature: float = 0.0, seed: int | None = None) -> list[str]:
    file = run.folder / "answers.json"
    options = {"prompt": PROMPTS, "text": ["Once upon"], "chat": False, "max_new_tokens": 8, "json": file}
    generate_over_processes(run, Namespace(**options, temperature=temperature, seed=seed))
    return [row["model"] for row in json.loads(file.read_text())] if is_main_process() else []


@pytest.fixture(scope="module")
def expected_ids(model) -> dict[str, list[list[int]]]:
    """Plain transformers' answers in float32, one prompt at a time, by how the weights are held."""
    tokenizer, found = AutoTokenizer.from_pretrained(model), {}
    for load, method in (("stored", "full"), ("nf4", "qlora")):
        plain, found[load] = plain_model(model, method).eval(), []
        inputs = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            for prompt in PROMPTS
        ]
        begun = tokenizer.bos_token + "Once upon"
        inputs.append(tokenizer(begun, add_special_tokens=False, return_tensors="pt"))
        for prompt in inputs:
            output = plain.generate(**prompt, max_new_tokens=8, do_sample=False)
            found[load].append(output[0, prompt["input_ids"].shape[1] :].tolist())
    return found


@pytest.fixture(scope="module")
def expected(model, expected_ids) -> dict[str, list[str]]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return {
        load: [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]
        for load, answers in expected_ids.items()
    }


WAYS = [("stored", 1, True), ("stored", 2, False), ("nf4", 1, False), ("nf4", 2, False), ("nf4", 2, True)]


@pytest.mark.parametrize(("load", "ranks", "offload"), WAYS)
def test_answers_are_plain_transformers(model, expected, tmp_path, load, ranks, offload):
    run = held(model, tmp_path / "run", load, ranks, offload)
    assert run_ranks(ask, ranks, run)[0] == expected[load]


def test_reading_a_model_is_said_in_fitunes_way(model, capfd):
    logging.enable_progress_bar()
    result = CliRunner().invoke(cli, ["generate", str(model), "--text", "Once", "--max-new-tokens", "2"])
    printed = result.stderr + capfd.readouterr().err
    assert result.exit_code == 0 and "reading the model: " in printed and "Loading weights" not in printed


def test_a_damaged_file_is_named(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    file = max(folder.glob("*.safetensors"))
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 4)
    result = CliRunner().invoke(cli, ["generate", str(folder), "--text", "Once", "--max-new-tokens", "2"])
    assert result.exit_code == 1 and f"{file}: tensor " in result.stderr and "truncated at " in result.stderr


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_damaged_small_files_are_named(model, tmp_path, name):
    """transformers goes on without a generation_config.json that it cannot read, and with other stop tokens."""
    file = Path(shutil.copytree(model, tmp_path / "model")) / name
    for damaged, said in (("[]", "holds a list, not an object"), ("{", "cannot be read as JSON")):
        file.write_text(damaged)
        result = CliRunner().invoke(cli, ["generate", str(file.parent), "--text", "Once", "--max-new-tokens", "2"])
        assert result.exit_code == 2 and f"error: {file}: {said}" in result.stderr, result.output


OTHER_TENSORS = {
    "missing": ({}, "model.norm.weight", 1, "tensor model.norm.weight is missing"),
    "other shapes": ({"intermediate_size": 64}, None, 1, r"tensor model.layers.0.mlp.down_proj.weight has shape \(.*, "
                     r"the model needs \(\d+, 64\) \(and \d+ more\); config.json belongs to another model\?"),
    "no place": ({"num_hidden_layers": 1}, None, 0, r"note: .* tensor model.layers.1.input_layernorm.weight has no"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "without", "code", "said"), OTHER_TENSORS.values(), ids=OTHER_TENSORS)
def test_no_weight_is_made_up(model, tmp_path, config, without, code, said):
    """transformers fills what lacks with random numbers."""
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    kept = {name: tensor for name, tensor in tensors.items() if name != without}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    result = CliRunner().invoke(cli, ["generate", str(folder), "--text", "Once", "--max-new-tokens", "2"])
    assert result.exit_code == code and re.search(said, result.stderr), result.output


def test_answers_end_where_the_folder_says(model, expected_ids, tmp_path):
    """At a token that config.json does not know, for one prompt of a batch earlier than for another."""
    folder, tokenizer = tmp_path / "model", AutoTokenizer.from_pretrained(model)
    shutil.copytree(model, folder)
    whole = expected_ids["stored"]
    end = next(token for token in whole[0][1:] if any(token not in ids for ids in whole))
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [*ends, end]}))
    texts = run_ranks(ask, 2, held(folder, tmp_path / "run", "stored", 2, False))[0]
    until = [ids[: ids.index(end)] if end in ids else ids for ids in whole]
    assert texts == [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in until]


@pytest.mark.parametrize(("load", "ranks", "offload"), [("stored", 2, False), ("nf4", 1, False)])
def test_rows_are_measured_as_on_one_device(model, prepared, tmp_path, load, ranks, offload):
    """On two ranks 7 rows leave one rank without in the last pass."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join((prepared / "test.jsonl").read_text().splitlines(keepends=True)[:7]))
    run = held(model, tmp_path / "run", load, ranks, offload)
    found = run_ranks(evaluate_model, ranks, run, tokenise(rows, given_model(model), run.folder).path)
    assert all(report == found[0] for report in found) and found[0]["rows"] == 7
    as_held = tmp_path / "as_held"
    if load == "nf4":
        plain_model(model, "qlora").save_pretrained(as_held)
    else:
        plain_model(model).save_pretrained(as_held)
    AutoTokenizer.from_pretrained(model).save_pretrained(as_held)
    expected = evaluate_folder(given_model(as_held), rows)["model"]
    assert found[0]["model"]["tokens"] == expected["tokens"]
    error = rounding(additions_to_logits(LlamaConfig.from_pretrained(model), 256))
    assert found[0]["model"]["loss"] == pytest.approx(expected["loss"], rel=error)


def test_a_seed_repeats_a_batch_and_without_one_it_is_drawn_anew(model, tmp_path):
    run = held(model, tmp_path / "run", "stored", 2, False)
    drawn = [run_ranks(ask, 2, run, 1.5, seed)[0] for seed in (3, 3, None, None)]
    assert drawn[0] == drawn[1] and len({tuple(texts) for texts in drawn}) == 3


@pytest.mark.parametrize(
    ("gpus", "gib", "exact", "taken"),
    [
        (1, 79, False, None),
        (1, 11, False, "weights in NF4, on 1 GPU"),
        (2, 15, True, "weights as stored, on 2 GPUs"),
        (1, 6, False, "weights in NF4, on 1 GPU, from host RAM layer by layer"),
    ],
)
def test_a_folder_goes_where_it_fits_and_that_is_said(tmp_path, monkeypatch, capsys, gpus, gib, exact, taken):
    """Plain transformers take it where one GPU holds it."""
    write_8b_config(tmp_path)
    monkeypatch.setattr("fitune.planning.hardware.found_here", lambda: given_machine(gpus, gib, 64))
    given = given_model(tmp_path)
    way = how_to_hold(given, "auto", exact=exact)
    said = capsys.readouterr().err
    assert (str(way) if way else None) == taken
    assert said == (f"{tmp_path}: {way}: {way.gpu:.1f} GiB of each GPU, {way.host:.1f} of RAM\n" if way else "")
    run = run_to_ask(given, replace(way, ranks=2), tmp_path) if way else None
    assert run is None or (run.accelerate.num_processes, run.accelerate.offload_params) == (2, way.offload)


def write_8b_config(folder: Path) -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = sizes | {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256}
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))


def test_a_folder_is_held_where_there_is_room_for_the_longest_row(tmp_path, monkeypatch):
    write_8b_config(tmp_path)
    short, long = (Reading(tokens, answers=False) for tokens in (1024, 8192))
    asked = asked_folder(tmp_path)
    needed = [next(holdings(asked, 1, reading)).gpu for reading in (short, long)]
    by_plain = as_plain(next(holdings(asked, 1, long)), asked, long).gpu
    assert by_plain == pytest.approx(needed[1] + (8192 * 10 - 1024 * 4) * 128256 / 2**30)

    def taken(gib: float, reading: Reading) -> str | None:
        monkeypatch.setattr("fitune.planning.hardware.found_here", lambda: given_machine(1, gib, 64))
        way = how_to_hold(given_model(tmp_path), "auto", reading=reading)
        return way and str(way)

    between = sum(needed) / 2
    assert taken(between, long) == "weights in NF4, on 1 GPU" != taken(between, short)
    assert taken(needed[1] + 0.1, long) == "weights as stored, on 1 GPU", "a tile of logits at a time"
    assert taken(by_plain + 0.1, long) is None, "plain transformers have room for all"
    assert taken(needed[1] + 0.1, replace(long, answers=True, tokens=1024)) is None, "an answer needs the last alone"


def test_the_commands_start_processes_that_hold_it(model, prepared, expected, tmp_path, capfd, quick_ranks):
    """The real `generate` and `eval`, in 4 bits on the CPU."""
    asked = ["generate", str(model), "--load", "nf4", "--max-new-tokens", "8", "--json", str(tmp_path / "a.json")]
    for prompt in PROMPTS:
        asked += ["--prompt", prompt]
    for command in (asked, ["eval", str(model), "--load", "nf4", "--data", str(prepared)]):
        result = CliRunner().invoke(cli, command)
        assert result.exit_code == 0, result.output + capfd.readouterr().err
    assert [row["model"] for row in json.loads((tmp_path / "a.json").read_text())] == expected["nf4"][: len(PROMPTS)]
    printed = capfd.readouterr().out
    assert "held-out rows: 8" in printed


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_load_is_for_a_models_folder(make_run, tiny_base, tmp_path, command):
    run = make_run(tiny_base, tmp_path / "run", "lora")
    empty_adapter(run.result_folder)
    (run.folder / "run.yaml").write_text(runs.dump(run))
    flags = ["--prompt", "Hi"] if command == "generate" else []
    result = CliRunner().invoke(cli, [command, str(run.folder), "--load", "nf4", *flags])
    assert result.exit_code == 2 and "--load is for folders of models" in result.output
