"""`generate --test`: what a held-out row asks, with the tools that it may call."""

import json
from argparse import Namespace
from types import SimpleNamespace

import torch
from tiny_tokenizer import tiny_tokenizer

from fitune.config.schema import Data, Recipe
from fitune.data.chat_template import apply_chat_template_choice
from fitune.training.generate import Answerer, _conversations

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
    [(asked, tools)] = _conversations(SimpleNamespace(recipe=recipe), Namespace(prompt=[], test=3))
    assert tools == TOOLS
    assert asked == [messages[0], {"role": "assistant", "content": "Yes."}, messages[0]]

    tokenizer, model = tiny_tokenizer(), Echo()
    apply_chat_template_choice(tokenizer, "llama3")
    Answerer(model, tokenizer, [0], "cpu", 4, 0.0).answer(asked, tools)
    assert json.dumps(TOOLS[0]) in tokenizer.decode(model.asked)
