"""The loss is taken on the assistant's tokens and no others, and packed conversations do not see each other."""

import json
import shutil
from itertools import groupby
from pathlib import Path

import pytest
import torch
from ranks import run_ranks, sharded_model
from rounding import additions_to_logits, assert_equal_but_for_rounding, distance, rounding
from transformers import LlamaConfig

from fitune.data.dataset import load_tokenizer
from fitune.data.prepared import load_rows
from fitune.model.sharding import local_part
from fitune.training.trainer import ShardedSFTTrainer

IGNORED = -100


def _trainer(run) -> ShardedSFTTrainer:
    model, tokenizer = sharded_model(run)
    rows = load_rows(run.recipe, "train", tokenizer, run.folder / "cache")
    return ShardedSFTTrainer(run, model=model, processing_class=tokenizer, train_dataset=rows)


def _prepared_rows(run) -> dict:
    """The trainer's own dataset and a collated batch of its first rows, decoded."""
    trainer = _trainer(run)
    tokenizer, rows = trainer.processing_class, list(trainer.train_dataset)
    batch = trainer.data_collator(rows[:4])
    return {
        "rows": rows,
        "batch": dict(batch),
        "answers": [_answers(tokenizer, row) for row in rows],
        "special": {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
        "end of turn": tokenizer.convert_tokens_to_ids("<|eot_id|>"),
        "model's pad": trainer.model.config.pad_token_id,
    }


def _answers(tokenizer, row: dict) -> list[str]:
    """The text of every run of tokens that the loss is taken on."""
    spans = groupby(zip(row["input_ids"], row["labels"], strict=True), key=lambda pair: pair[1] != IGNORED)
    return [tokenizer.decode([label for _, label in span]) for learned, span in spans if learned]


def _conversations(prepared) -> list[list[dict]]:
    return [json.loads(line)["messages"] for line in (prepared / "train.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("template", "answer"), [("llama3", "{}<|eot_id|>"), ("plain", " {}<|end_of_text|>")], ids=["llama3", "plain"]
)
def test_loss_is_on_the_assistants_tokens_only(template, answer, tiny_base, make_run, prepared, tmp_path):
    run = make_run(tiny_base, tmp_path, chat_template=template, micro_batch=4)
    found = run_ranks(_prepared_rows, 1, run)[0]
    conversations, special = _conversations(prepared), found["special"]
    assert len(found["rows"]) == len(conversations)
    for row, answers, messages in zip(found["rows"], found["answers"], conversations, strict=True):
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        assert answers == [answer.format(text) for text in said]
        assert all(label in (IGNORED, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
        assert row["input_ids"].count(special["bos"]) == 1
        assert row["input_ids"][0] == special["bos"]
        turns = [message for message in messages if template == "llama3" or message["role"] != "system"]
        end = found["end of turn"] if template == "llama3" else special["eos"]
        assert row["input_ids"].count(end) == len(turns)
        assert special["pad"] not in row["input_ids"]

    assert special["pad"] not in (special["eos"], special["bos"], found["end of turn"], None)
    assert found["model's pad"] == special["pad"]
    batch = found["batch"]
    lengths = [len(row["input_ids"]) for row in found["rows"][:4]]
    assert len(set(lengths)) > 1
    assert batch["attention_mask"].sum(1).tolist() == lengths
    padding = batch["attention_mask"] == 0
    assert (batch["input_ids"][padding] == special["pad"]).all()
    assert (batch["labels"][padding] == IGNORED).all()


def _segments(row: dict) -> list[slice]:
    ends = torch.tensor(row["seq_lengths"]).cumsum(0).tolist()
    return [slice(end - length, end) for end, length in zip(ends, row["seq_lengths"], strict=True)]


def _alone(row: dict, segment: slice) -> dict:
    length = segment.stop - segment.start
    return {key: row[key][segment] for key in ("input_ids", "labels")} | {"seq_lengths": [length]}


def _packed(run) -> dict:
    """Logits and loss of packed conversations in several surroundings, through trainer, collator and model."""
    trainer = _trainer(run)
    model, collate = trainer.model.train(), trainer.data_collator
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start
            torch.nn.init.normal_(local_part(parameter), std=0.1, generator=torch.Generator().manual_seed(len(name)))

    @torch.no_grad()
    def logits(rows, **more):
        inputs = trainer._prepare_inputs(collate(rows)) | more
        return model(**{key: value for key, value in inputs.items() if key != "labels"}, use_cache=False).logits[0]

    @torch.no_grad()
    def loss(row):
        return trainer.compute_loss(model, trainer._prepare_inputs(collate([row]))).double()

    rows = sorted(trainer.train_dataset, key=lambda row: -len(row["seq_lengths"]))
    report = {"rows": rows, "batch": dict(collate(rows[:2])), "cases": [], "bos": trainer.processing_class.bos_token_id}
    generator = torch.Generator().manual_seed(0)
    for row in rows[:2]:
        packed = logits([row])
        length = len(row["input_ids"])
        one_example = {"cu_seq_lens_q": torch.tensor([0, length], dtype=torch.int32), "max_length_q": length}
        learned, losses = [], []
        for segment in _segments(row):
            noise = torch.randint(0, 250, (len(row["input_ids"]),), generator=generator)
            noise[segment] = torch.tensor(row["input_ids"][segment])
            alone = _alone(row, segment)
            report["cases"].append(
                {
                    "packed": packed[segment],
                    "alone": logits([alone]),
                    "other neighbours": logits([row | {"input_ids": noise.tolist()}])[segment],
                    "two rows": logits([row, rows[2]])[segment],
                    "leaking": logits([row], **one_example)[segment] if segment.start else None,
                }
            )
            learned.append(sum(label != IGNORED for label in alone["labels"]))
            losses.append(loss(alone))
        report["cases"][-1]["loss"] = loss(row).item()
        mean = torch.stack(losses) @ torch.tensor(learned, dtype=torch.float64) / sum(learned)
        report["cases"][-1]["expected loss"] = mean.item()
    return report


def test_packed_conversations_do_not_see_each_other(tiny_base, make_run, prepared, tmp_path):
    run = make_run(tiny_base, tmp_path, packing=True, max_length=160)
    report = run_ranks(_packed, 1, run)[0]
    conversations = _conversations(prepared)

    lengths = [length for row in report["rows"] for length in row["seq_lengths"]]
    assert len(lengths) == len(conversations) > len(report["rows"])
    for row in report["rows"]:
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) <= run.recipe.max_length
        for segment in _segments(row):
            assert [i for i, token in enumerate(row["input_ids"][segment]) if token == report["bos"]] == [0]
            assert row["labels"][segment][0] == IGNORED  # nothing predicts a conversation's start

    batch = report["batch"]
    assert "attention_mask" not in batch  # an all-ones mask would override the position ids
    starts = [length for row in report["rows"][:2] for length in row["seq_lengths"]]
    assert batch["position_ids"][0].tolist() == [position for length in starts for position in range(length)]
    assert len(report["cases"]) >= 5
    config = LlamaConfig.from_pretrained(tiny_base)
    additions = additions_to_logits(config, length=2 * run.recipe.max_length)
    for case in report["cases"]:
        # The same shapes go through the same kernels: whatever a neighbour says, not a bit may change.
        assert torch.equal(case["packed"], case["other neighbours"])
        for surroundings in ("alone", "two rows"):  # other shapes: sums in another order
            assert_equal_but_for_rounding(case[surroundings], case["packed"], additions, of=surroundings)
        if case["leaking"] is not None:  # what these comparisons would see if conversations saw each other
            assert distance(case["leaking"], case["packed"]) > 100 * rounding(additions)
        if "loss" in case:
            assert case["loss"] == pytest.approx(case["expected loss"], rel=rounding(additions + config.vocab_size))


def _lengths(runs: dict) -> dict:
    return {name: [len(row["input_ids"]) for row in _trainer(run).train_dataset] for name, run in runs.items()}


def test_rows_are_cut_at_max_length(tiny_base, make_run, tmp_path):
    runs = {
        "packed": make_run(tiny_base, tmp_path / "a", packing=True, max_length=96),
        "single": make_run(tiny_base, tmp_path / "b", packing=False, max_length=96),
    }
    for lengths in run_ranks(_lengths, 1, runs)[0].values():
        assert max(lengths) == 96


def _learns_its_pad(run) -> bool:
    model, tokenizer = sharded_model(run)
    tokens = torch.tensor([[tokenizer.pad_token_id, 5, 7]])
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    gradient = local_part(model.get_input_embeddings().weight.grad)
    return bool(gradient[tokenizer.pad_token_id].any())


def test_a_token_that_also_pads_is_learned(tiny_base, make_run, tmp_path):
    """Where a base pads with the end of its turns, its config says so too, and torch's embedding would skip it."""
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    pad = load_tokenizer(make_run(base, tmp_path, "full").recipe, base).pad_token_id
    (base / "config.json").write_text(json.dumps(config | {"pad_token_id": pad}))
    assert run_ranks(_learns_its_pad, 1, make_run(base, tmp_path, "full"))[0]
