"""The model card: what the Hub reads of it, and the figures of the run."""

import json

import pytest
import yaml
from adapters import set_values
from bases import make_adapter

from fitune.config.adapter_folder import BASE_RECORD
from fitune.config.recipe import EarlyStopping
from fitune.export.chat_record import ChatRecord, write_chat_record
from fitune.export.model_card import write_model_card

REPORT = {
    "train_rows": 1200,
    "test_rows": 60,
    "tokens": {"total": 34567, "trained_share": 0.25},
    "dropped": {"too_long": 3},
    "source": {"dataset": "org/rows", "revision": "abc123", "sha256": "01ab"},
    "mixed_in": [{"dataset": "/home/me/more.jsonl", "revision": None, "sha256": "23cd"}],
}
"Of other rows than the recipe's."


def metrics(loss: float) -> dict:
    return {"loss": loss, "perplexity": 2.5, "token_accuracy": 0.5}


@pytest.fixture
def run(tiny_base, make_run, tmp_path):
    made = make_run(tiny_base, tmp_path / "my-run", "lora", training={"learning_rate": 2e-4})
    data = made.recipe.data.model_copy(update={"dataset": "org/recipe", "prepared": str(tmp_path / "data")})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "report.json").write_text(json.dumps(REPORT))
    made.folder.mkdir()
    lines = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25}, {"step": 2, "eval_loss": 2.125}, {"step": 2}]
    (made.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return made.model_copy(update={"recipe": made.recipe.model_copy(update={"data": data})})


def card(tmp_path, run, base="meta-llama/Meta-Llama-3-8B", licence="META LLAMA 3 COMMUNITY LICENSE AGREEMENT"):
    folder, base_folder = tmp_path / "out", tmp_path / "base"
    for path in (folder, base_folder):
        path.mkdir(exist_ok=True)
    (base_folder / "LICENSE").write_text(licence)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    write_model_card(folder, run, base, "0123abcd", base_folder)
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def test_what_the_hub_reads(run, tmp_path):
    front, body = card(tmp_path, run)
    assert front == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["fitune", "lora"],
        "license": "llama3",
        "base_model": "meta-llama/Meta-Llama-3-8B",
        "base_model_relation": "adapter",
        "datasets": ["org/rows"],
    }
    assert "Base: `meta-llama/Meta-Llama-3-8B` at `0123abcd`." in body and "Built with Meta Llama 3." in body


def test_data_settings_losses_and_template(run, tmp_path):
    (run.folder / "eval.json").write_text(json.dumps({"base": metrics(3.5), "tuned": metrics(2.0625)}))
    _, body = card(tmp_path, run)
    for said in (
        "- dataset: `org/rows`, version `abc123`\n- dataset: `more.jsonl`, version `SHA-256 23cd`\n",
        "- rows: 1,200 to train on, 60 held out",
        "- tokens: 34,567, 25.0% of them trained",
        "- rows left out: 3 too_long",
        "| learning_rate | 0.0002 |",
        "| LoRA r | 4 |",
        "| base | 3.5000 | 2.50 | 50.0% |",
        "| tuned | 2.0625 | 2.50 | 50.0% |",
        "Last training loss: 2.2500, step 2.",
        "Last held-out loss while training: 2.1250, step 2.",
        "```jinja\n{{ messages }}\n```",
    ):
        assert said in body, said


def test_rows_that_were_prepared_since_are_not_the_runs(run, tmp_path):
    """The folder has their report; the run's own is in its data.json, of an older run nowhere."""
    other = REPORT | {
        "source": {"dataset": "org/other", "revision": "def456"},
        "files": {"train.jsonl": {"sha256": "2"}},
    }
    (tmp_path / "data" / "report.json").write_text(json.dumps(other))
    (run.folder / "origin.json").write_text(json.dumps({"identity": {"data": "1"}}))
    front, body = card(tmp_path, run)
    assert "## Data\n\nNot described here: the rows that were prepared last are others" in body
    assert "datasets" not in front and "org/other" not in body
    (run.folder / "data.json").write_text(json.dumps({"rows": {"train": "1"}, "report": REPORT}))
    front, body = card(tmp_path, run)
    assert front["datasets"] == ["org/rows"] and "- dataset: `org/rows`, version `abc123`\n" in body
    (run.folder / "data.json").unlink()
    (run.folder / "origin.json").write_text(json.dumps({"identity": {"data": "2"}}))
    assert "- dataset: `org/other`, version `def456`\n" in card(tmp_path, run)[1]


def test_a_base_kept_in_fp8_is_named_beside_the_loss(run, tmp_path):
    _, body = card(tmp_path, run)
    assert "Last held-out loss while training: 2.1250, step 2." in body
    in_fp8 = run.model_copy(update={"profile": run.profile.model_copy(update={"compute": "fp8"})})
    _, body = card(tmp_path, in_fp8)
    assert "Last held-out loss while training, beside the base rounded to fp8: 2.1250, step 2." in body


def test_a_local_base_is_named_without_its_path_and_an_unknown_licence_is_other(tmp_path):
    front, body = card(tmp_path, None, base=str(tmp_path / "secret" / "my-base"), licence="All mine.")
    assert front["license"] == "other" and "base_model" not in front
    assert "Base: `my-base`" in body and str(tmp_path) not in body
    assert "## Data" not in body and "## Losses" not in body


@pytest.mark.parametrize(
    ("config", "misread"),
    [
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, True),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0}}, True),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, False),  # what 4.x takes unasked
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta": 5e5}, False),
        ({"rope_theta": 5e5}, False),
    ],
)
def test_an_adapter_says_where_transformers_4_misreads_its_base(tmp_path, config, misread):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    _, body = card(tmp_path, None)
    assert ("does not find its `rope_theta`" in body) == misread


def test_of_a_checkpoint_only_what_was_logged_up_to_it_counts(run, tmp_path):
    at_one = run.model_copy(update={"checkpoint": str(run.folder / "checkpoints" / "checkpoint-1")})
    _, body = card(tmp_path, at_one)
    assert "Last training loss: 2.5000, step 1." in body and "held-out loss" not in body


def with_recipe(run, **changes):
    return run.model_copy(update={"recipe": run.recipe.model_copy(update=changes)})


def test_every_setting_that_decided_how_it_was_trained_is_listed(run, tmp_path):
    training = {
        "loss_type": "dft", "neftune_noise_alpha": 5.0, "label_smoothing_factor": 0.1, "max_grad_norm": 0.3,
        "warmup_steps": 0.03, "lr_scheduler_kwargs": {"num_cycles": 2, "min_lr": 0.1}, "weight_decay": 0.0,
        "optim_args": "a=1|b", "adam_beta2": None, "run_name": "secret", "project": "secret", "trackio_space_id": "s/t",
    }  # fmt: skip
    lora = run.recipe.lora.model_copy(update={"trainable_tokens": ["<|eot_id|>", "<|end|>"]})
    data = run.recipe.data.model_copy(update={"train_on": "last"})
    changed = with_recipe(run, training=training, lora=lora, data=data, early_stopping=EarlyStopping(patience=2))
    table = card(tmp_path, changed)[1].partition("## Settings")[2].partition("## ")[0]
    for row in (
        "| train_on | last |", "| loss_type | dft |", "| neftune_noise_alpha | 5.0 |", "| max_grad_norm | 0.3 |",
        "| label_smoothing_factor | 0.1 |", "| warmup_steps | 0.03 |", "| weight_decay | 0.0 |",
        "| lr_scheduler_kwargs | num_cycles=2, min_lr=0.1 |", "| optim_args | a=1\\|b |",
        "| early_stopping.patience | 2 |", "| trained tokens | `<\\|eot_id\\|>`, `<\\|end\\|>` |",
    ):  # fmt: skip
        assert row in table.splitlines(), row
    assert "secret" not in table and "trackio" not in table and "None" not in table
    assert "trained tokens" not in card(tmp_path, run)[1]


@pytest.mark.parametrize(
    ("training", "named"),
    [
        ({"loss_type": "dft"}, " (loss_type dft)"),
        ({"loss_type": "dft", "label_smoothing_factor": 0.1}, " (loss_type dft, label_smoothing_factor 0.1)"),
        ({"loss_type": "nll", "label_smoothing_factor": 0.0}, ""),
    ],
)
def test_a_loss_of_another_kind_is_named(run, tmp_path, training, named):
    _, body = card(tmp_path, with_recipe(run, training=training))
    assert f"Last training loss{named}: 2.2500, step 2." in body
    assert ("do not compare the two" in body) == bool(named)
    assert "Last held-out loss while training: 2.1250, step 2." in body


def test_the_system_message_is_told(run, tmp_path):
    assert "## System message" not in card(tmp_path, run)[1]
    data = run.recipe.data.model_copy(update={"system_message": "Be brief.\n```\ncode\n```"})
    said = "````text\nBe brief.\n```\ncode\n```\n````\n\n## Chat template"
    assert said in card(tmp_path, with_recipe(run, data=data))[1], "an older folder has no record of it"
    write_chat_record(tmp_path / "out", ChatRecord("0" * 64, "Be kind."))
    assert "```text\nBe kind.\n```" in card(tmp_path, None)[1], "an adapter that is merged without its run"


@pytest.mark.parametrize("noted_in", ["best.json", "finished.json"])
def test_of_the_best_evaluation_only_what_was_logged_up_to_it_counts(run, tmp_path, noted_in):
    """best.json has its step while the result is written, finished.json after that."""
    the_best = with_recipe(run, training={"load_best_model_at_end": True})
    assert "Last training loss: 2.2500, step 2." in card(tmp_path, the_best)[1], "an older run does not say its step"
    (run.folder / "finished.json").write_text('{"step": 2}')
    (run.folder / noted_in).write_text('{"step": 2, "result_step": 1}')
    _, body = card(tmp_path, the_best)
    assert "Result: step 1, the best evaluation; training went on to step 2.\n" in body
    assert "Last training loss: 2.5000, step 1." in body and "held-out loss" not in body
    assert "Result: " not in card(tmp_path, run)[1], "nobody asked for the best"
    at_two = the_best.model_copy(update={"checkpoint": str(run.folder / "checkpoints" / "checkpoint-2")})
    assert "Last training loss: 2.2500, step 2." in card(tmp_path, at_two)[1]


@pytest.mark.parametrize(
    ("method", "onto", "said"),
    [
        ("qlora", "trained", "went through NF4 and back, as in training"),
        ("qlora", "original", "no loss here is of this model"),
        ("lora", "original", "added to the base's weights as they are stored."),
        (None, "original", "added to the base's weights as they are stored."),
        ("qlora", None, None),
    ],
)
def test_a_merged_model_says_which_numbers_are_its_own(run, tmp_path, method, onto, said):
    of = run.model_copy(update={"recipe": run.recipe.model_copy(update={"method": method})}) if method else None
    write_model_card(tmp_path, of, "org/base", None, tmp_path, onto=onto)
    merged = [line for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("Merged: ")]
    assert len(merged) == (onto is not None) and all(said in line for line in merged)


def served(adapter) -> str:
    write_model_card(adapter, None, "org/base", "0123abcd", adapter)
    return (adapter / "README.md").read_text().partition("## Serving")[2]


def test_an_adapter_says_how_vllm_and_sglang_serve_it(tiny_base, tmp_path):
    adapter = make_adapter(tiny_base, tmp_path / "adapter", r=20)
    at = "org/base --revision 0123abcd"
    commands = [
        f"vllm serve {at} --enable-lora --lora-modules tuned=ADAPTER --max-lora-rank 32",
        f"python -m sglang.launch_server --model-path {at} --lora-paths tuned=ADAPTER",
    ]
    assert "```\n" + "\n".join(commands) + "\n```" in served(adapter) and "NF4" not in served(adapter)
    (adapter / BASE_RECORD).write_text(json.dumps({"computed_in": "nf4"}))
    assert "trained and measured beside weights in NF4" in served(adapter)


def test_it_says_which_server_does_not_take_it(tiny_base, tmp_path):
    adapter = make_adapter(tiny_base, tmp_path / "adapter", use_rslora=True)
    said = served(adapter)
    assert "vllm serve" in said and "sglang.launch_server" not in said
    assert "SGLang takes no adapter with use_rslora, as it scales by alpha / r: for SGLang merge it" in said
    set_values(adapter / "adapter_config.json", modules_to_save=["lm_head"])
    said = served(adapter)
    assert "```" not in said
    for server in ("vLLM", "SGLang"):
        assert f"{server} takes no adapter with modules_to_save: for {server} merge it (`fitune merge`)." in said
