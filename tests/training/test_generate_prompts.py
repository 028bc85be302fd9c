"""What `generate` asks: held-out rows with their tools, questions with the system message that was trained."""

import json
import shutil
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM

from fitune.cli import cli
from fitune.config.recipe import Data, Recipe
from fitune.data.chat_template import apply_chat_template_choice, template_hash
from fitune.errors import UsageError
from fitune.export.chat_record import ChatRecord, read_chat_record, refuse_another_chat, write_chat_record
from fitune.planning.asking import CONVERSATION
from fitune.training import generate_model as generating
from fitune.training.answerer import Answerer
from fitune.training.asked import report
from fitune.training.chat import Shown
from fitune.training.generate import _conversations
from fitune.training.generate_model import generate_from_model
from fitune.training.given_model import given_model

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


class Echo:
    """A model that answers with nothing and keeps what it was asked."""

    def eval(self):
        return self

    def generate(self, input_ids, **_):
        self.asked = input_ids[0]
        return torch.cat([input_ids, input_ids[:, :1]], dim=1)


def test_a_held_out_row_is_asked_with_its_tools(tmp_path):
    messages = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "Yes.", "train": False}]
    row = {"messages": [*messages, *messages], "tools": json.dumps(TOOLS)}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    recipe = Recipe.model_construct(data=Data(dataset="none", prepared=str(tmp_path)))
    [(asked, tools)] = _conversations(SimpleNamespace(recipe=recipe), Namespace(prompt=[], text=[], test=3))
    assert tools == TOOLS
    assert asked == [messages[0], {"role": "assistant", "content": "Yes."}, messages[0]]

    tokenizer, model = tiny_tokenizer(), Echo()
    apply_chat_template_choice(tokenizer, "llama3")
    Answerer(model, tokenizer, [0], "cpu", 4, 0.0).answer(asked, tools)
    assert json.dumps(TOOLS[0]) in tokenizer.decode(model.asked)


def test_an_answer_ends_at_any_of_the_tokens_that_end_one():
    assert Answerer(Echo(), tiny_tokenizer(), [7, 3], "cpu", 4, 0.0).options["eos_token_id"] == [7, 3]


def test_an_answer_ends_with_a_text_that_ends_one(tiny_base):
    """`stop_strings` of a model's generation_config.json."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_base), tiny_tokenizer()
    whole = Answerer(model, tokenizer, [0], "cpu", 12, 0.0).answer("a")
    end = whole[len(whole) // 2]
    model.generation_config.stop_strings = [end]
    answer = Answerer(model, tokenizer, [0], "cpu", 12, 0.0).answer("a")
    assert end in answer and len(answer) < len(whole) and whole.startswith(answer)


def test_prompts_of_a_batch_have_no_more_tokens_than_the_conversation_that_plan_counts(monkeypatch):
    """70B in NF4 from host RAM takes 9 GiB for one of 4,096 tokens, and 43 GiB for 16, by `plan`'s own formulas."""
    words = [1] * 20 + [1000, 1000, 1000, 9000, 1, 1]
    asked = []

    class Batched(Echo):
        def generate(self, input_ids, **_):
            asked.append(tuple(input_ids.shape))
            return torch.cat([input_ids, input_ids[:, -1:]], dim=1)

    monkeypatch.setattr("fitune.training.answerer._weights_travel", lambda model: True)
    answerer = Answerer(Batched(), tiny_tokenizer(), [0], "cpu", 100, 0.0)
    monkeypatch.setattr(answerer, "_tokens", lambda count, _: {"input_ids": torch.arange(1, count + 1)[None]})
    monkeypatch.setattr(answerer, "_text", lambda tokens: tokens.item())
    assert answerer.answers([(count, None) for count in words]) == words
    assert asked == [(16, 1), (4, 1), (3, 1000), (1, 9000), (2, 1)]
    assert all(rows * (longest + 100) <= CONVERSATION.tokens or rows == 1 for rows, longest in asked)


def test_a_text_is_gone_on_with_as_texts_are_trained(tmp_path):
    """After the token that begins one, without a template, whatever the system message."""
    recipe = Recipe.model_construct(data=Data(dataset="none", prepared=str(tmp_path), system_message="Be brief."))
    options = Namespace(prompt=[], text=["Once upon a time"], test=0)
    [(asked, tools)] = _conversations(SimpleNamespace(recipe=recipe), options)
    tokenizer, model = tiny_tokenizer(), Echo()
    apply_chat_template_choice(tokenizer, "llama3")
    Answerer(model, tokenizer, [0], "cpu", 4, 0.0).answer(asked, tools)
    assert tokenizer.decode(model.asked) == tokenizer.bos_token + "Once upon a time"


def test_a_model_that_was_merged_is_asked_with_the_system_message_that_was_trained(tiny_base, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(tiny_base, folder)
    asked = {}
    monkeypatch.setattr(generating, "report", lambda conversations, *_: asked.update(enumerate(conversations)))
    options = Namespace(prompt=["Hi"], text=[], chat=False, max_new_tokens=1, temperature=0.0, seed=None, json=None)
    tokenizer = tiny_tokenizer()
    apply_chat_template_choice(tokenizer, "llama3")
    monkeypatch.setattr("fitune.data.chat_template.read_tokenizer", lambda _: tokenizer)
    question = {"role": "user", "content": "Hi"}
    generate_from_model(given_model(folder), options)
    assert asked[0][0] == [question]
    write_chat_record(folder, ChatRecord("-", "Be brief."))
    generate_from_model(given_model(folder), options)
    assert asked[0][0] == [{"role": "system", "content": "Be brief."}, question]


@pytest.mark.parametrize("flags", [["--prompt", "Hi"], ["--chat"], ["--chat", "--load", "nf4"]])
def test_a_model_without_a_chat_template_is_asked_with_text_only(flags, tmp_path):
    """Said before anything is loaded: the folder holds no weight."""
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    result = CliRunner().invoke(cli, ["generate", str(tmp_path), *flags])
    assert result.exit_code == 2
    assert f"{tmp_path}: has no chat template, as base models have none; give it --text to go on with" in result.stderr


def test_another_template_or_system_message_than_was_trained_is_refused(tmp_path):
    tokenizer, plain = tiny_tokenizer(), tiny_tokenizer()
    apply_chat_template_choice(tokenizer, "llama3")
    apply_chat_template_choice(plain, "plain")

    def run(**data):
        recipe = Recipe.model_construct(data=Data(dataset="none", prepared=str(tmp_path), **data))
        return SimpleNamespace(recipe=recipe, result_folder=tmp_path / "adapter", folder=tmp_path)

    refuse_another_chat(run(), plain)  # of an earlier version: nothing is known
    (tmp_path / "adapter").mkdir()
    write_chat_record(tmp_path / "adapter", ChatRecord(template_hash(tokenizer), "Be brief."))
    refuse_another_chat(run(system_message="Be brief."), tokenizer)
    with pytest.raises(UsageError, match="adapter: trained with another chat template than plain is now; put the old"):
        refuse_another_chat(run(system_message="Be brief.", chat_template="plain"), plain)
    with pytest.raises(UsageError, match=r"trained with data.system_message 'Be brief.'; .*run.yaml says None"):
        refuse_another_chat(run(), tokenizer)
    (tmp_path / "adapter" / "fitune_chat.json").write_text("{}")
    with pytest.raises(UsageError, match=r"fitune_chat.json: not a readable record of template and system message"):
        read_chat_record(tmp_path / "adapter")


def test_an_answer_moves_no_cursor_and_changes_no_colour(tmp_path, capsys):
    answer = "one\x1b[2Jtwo\x85three\u2028four\x07\nfive\tsix"
    report([([{"role": "user", "content": "Hi\x1b[31m"}], None)], {"tuned": [answer]}, tmp_path / "answers.json")
    shown = capsys.readouterr().out
    assert not set(shown) & set("\x1b\x85\u2028\x07") and "one�[2Jtwo�three�four�" in shown
    assert json.loads((tmp_path / "answers.json").read_text())[0]["tuned"] == answer
    streamed = Shown(SimpleNamespace(decode=lambda tokens, **_: answer), skip_prompt=False)
    streamed.put(torch.tensor([1]))
    streamed.end()
    assert "\x1b" not in capsys.readouterr().out
