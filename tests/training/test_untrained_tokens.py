"""A base that never learned the template's control tokens is named, with what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from ranks import run_ranks, sharded_model, train_here, whole
from rounding import additions_to_gradients, assert_equal_but_for_rounding
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from fitune.data.dataset import load_tokenizer
from fitune.errors import UsageError
from fitune.export.merge import merge_adapter
from fitune.model.skeleton import decoder
from fitune.training.loss import add_answer_loss, find_answers
from fitune.training.untrained_tokens import refuse_untrained_control_tokens

NAMES = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture(scope="module")
def base_like_llama_3(tiny_base, tmp_path_factory) -> Path:
    """The tiny base with the rows of the llama3 template's tokens at almost nothing, as in Llama 3's base models."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "untrained"
    shutil.copytree(tiny_base, folder)
    weights = load_file(folder / "model.safetensors")
    rows = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(NAMES)
    weights["model.embed_tokens.weight"][torch.tensor(rows)] *= 1e-4
    head = weights["lm_head.weight"]
    head[torch.tensor(rows)] = head[rows[0]].clone()  # all pushed away from any text, and so alike
    save_file(weights, folder / "model.safetensors")
    return folder


def check(run) -> None:
    folder = Path(run.recipe.base.model)
    refuse_untrained_control_tokens(run.recipe, folder, load_tokenizer(run.recipe, folder))


def test_untrained_tokens_are_named_with_both_ways_out(base_like_llama_3, make_run, tmp_path):
    with pytest.raises(UsageError) as caught:
        check(make_run(base_like_llama_3, tmp_path, "lora"))
    message = str(caught.value)
    assert all(name in message for name in NAMES)
    assert "data.chat_template=plain" in message and "lora.trainable_tokens=" in message


def test_what_the_message_offers_works(base_like_llama_3, tiny_base, make_run, tmp_path):
    check(make_run(base_like_llama_3, tmp_path, "lora", chat_template="plain"))
    check(make_run(base_like_llama_3, tmp_path, "lora", lora={"trainable_tokens": NAMES}))
    check(make_run(base_like_llama_3, tmp_path, "full"))
    check(make_run(tiny_base, tmp_path, "lora"))
    with pytest.raises(UsageError, match=r"untrained embeddings for <\|eot_id\|>,"):
        check(make_run(base_like_llama_3, tmp_path, "lora", lora={"trainable_tokens": NAMES[:2]}))


def test_a_few_rows_of_another_size_do_not_change_what_is_usual(tiny_base, make_run, tmp_path):
    """A base may hold rows that grew, as some do for rare tokens: the others are no less trained for that."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][:8] *= 1e4
    save_file(weights, folder / "model.safetensors")
    check(make_run(folder, tmp_path / "run", "lora"))


def _gradients(run, tokens) -> dict[str, torch.Tensor]:
    """Of the rows of trained tokens, with the loss of training."""
    model, _ = sharded_model(run)
    add_answer_loss(decoder(model))
    labels = tokens.clone()
    labels[:, :3] = -100
    answers = find_answers(labels)
    (model(input_ids=tokens, answers=answers, use_cache=False).loss / len(answers.tokens)).backward()
    deltas = {n: p for n, p in model.named_parameters() if "trainable_tokens_delta" in n}
    return {"lm_head" if "lm_head" in n else "model.embed_tokens": whole(p.grad) for n, p in deltas.items()}


@pytest.mark.parametrize("world_size", [1, 2])
def test_rows_of_embedding_and_head_get_the_whole_models_gradients(world_size, tiny_base, make_run, tmp_path):
    run = make_run(tiny_base, tmp_path, "lora", processes=world_size, lora={"trainable_tokens": NAMES})
    ids = load_tokenizer(run.recipe, tiny_base).convert_tokens_to_ids(NAMES)
    tokens = torch.tensor([[5, ids[0], 77, ids[1], 300, 21, ids[2]], [8, 9, ids[0], 4, ids[1], ids[2], 2]])
    found = run_ranks(_gradients, world_size, run, tokens)[0]

    plain = LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    labels = tokens.clone()
    labels[:, :3] = -100
    plain(input_ids=tokens, labels=labels).loss.backward()
    additions = additions_to_gradients(plain.config, length=tokens.shape[1], tokens=tokens.numel())
    for name in ("model.embed_tokens", "lm_head"):
        expected = plain.get_submodule(name).weight.grad[ids]
        assert expected.abs().sum() > 0
        assert_equal_but_for_rounding(found[name], expected, additions, of=name)


def test_a_base_that_never_saw_the_template_learns_to_end_its_turn(base_like_llama_3, make_run, tmp_path):
    """Through training on two ranks, a resume, and merge: greedy answers end with the token they were trained to."""
    training = {"max_steps": 30, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 15}
    lora = {"r": 16, "alpha": 32, "trainable_tokens": NAMES}
    run = make_run(base_like_llama_3, tmp_path / "run", "lora", processes=2, batch=8, micro_batch=4,
                   lora=lora, training=training)  # fmt: skip
    run_ranks(train_here, 2, run)
    adapter = load_file(run.result_folder / "adapter_model.safetensors")
    shutil.rmtree(run.folder / "checkpoints/checkpoint-30")
    shutil.rmtree(run.result_folder)
    run_ranks(train_here, 2, run.model_copy(update={"resume": True}))
    resumed = load_file(run.result_folder / "adapter_model.safetensors")
    assert sum("trainable_tokens_delta" in name for name in adapter) == 2
    assert all(torch.equal(adapter[name], resumed[name]) for name in adapter)

    merged = merge_adapter(base_like_llama_3, run.result_folder, tmp_path / "merged", progress=False)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    [end, *_] = tokenizer.convert_tokens_to_ids(NAMES[-1:])
    row = json.loads((Path(run.recipe.data.prepared) / "train.jsonl").read_text().splitlines()[0])
    text = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, tokenize=False)
    answer = row["messages"][-1]["content"]
    ids = tokenizer(text + answer, return_tensors="pt", add_special_tokens=False).input_ids
    for folder, said in ((base_like_llama_3, False), (merged, True)):
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            assert (model(ids).logits[0, -1].argmax().item() == end) is said
    peft = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base_like_llama_3), run.result_folder)
    with torch.no_grad():
        assert peft(ids).logits[0, -1].argmax().item() == end
