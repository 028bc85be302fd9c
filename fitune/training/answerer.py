"""A model that answers: one conversation after the other, or several in one batch where that is faster."""

import random
import secrets
from collections.abc import Iterator, Mapping

import jinja2
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from fitune.data.file_formats import first_line
from fitune.errors import UsageError
from fitune.model.attention import PADDED_ATTENTION
from fitune.model.sharding import computes_on
from fitune.model.skeleton import decoder
from fitune.planning.asking import CONVERSATION
from fitune.training.asked import Asked

AT_ONCE = 16
"Prompts of a batch, at most."


def refuse_longer_than_the_model(max_new_tokens: int, config: Mapping) -> None:
    """Raises UsageError for answers that alone would fill the positions of a model with this config.json."""
    positions = config.get("max_position_embeddings")
    if positions and max_new_tokens >= positions:
        raise UsageError(f"--max-new-tokens {max_new_tokens:,}: the model has {positions:,} positions in all")


class Answerer:
    """A model, its tokenizer and the tokens at which an answer ends."""

    def __init__(
        self,
        model,
        tokenizer,
        stop_ids: list[int] | int | None,
        device,
        max_new_tokens: int,
        temperature: float,
        seed: int | None = None,
    ):
        """At a `temperature` every answer is drawn anew, and the same again for the same `seed`."""
        self.model, self.tokenizer, self.device = model.eval(), tokenizer, device
        self.stop_ids = stop_ids if isinstance(stop_ids, list) else [stop_ids]  # a model without any: None
        self.seeds = random.Random(shared_seed() if seed is None and temperature > 0 else seed)
        self.options = {
            "max_new_tokens": max_new_tokens,
            "eos_token_id": stop_ids,
            "do_sample": temperature > 0,
            "pad_token_id": tokenizer.pad_token_id,
            "tokenizer": tokenizer,  # for stop_strings of generation_config.json
            "use_cache": True,  # whatever config.json says: without one, layers take pads on the left for tokens
        }
        if temperature > 0:
            self.options["temperature"] = temperature

    def answers(self, conversations: list[Asked]) -> list[str]:
        """Of all conversations. In batches where weights travel anew for each token, however many it is for."""
        if not _weights_travel(self.model):
            return [self.answer(*asked) for asked in conversations]
        prompts = [self._tokens(*asked)["input_ids"][0] for asked in conversations]
        return [text for batch in self._batches(prompts) for text in self._answer_at_once(batch)]

    @torch.no_grad()
    def answer(self, asked: list[dict] | str, tools: list | None = None, streamer=None, stopping=None) -> str:
        """The next assistant turn, or how a text goes on. On a sharded model every rank must ask the same."""
        inputs = self._tokens(asked, tools).to(self.device)
        self._draw_anew()
        output = self.model.generate(**inputs, **self.options, streamer=streamer, stopping_criteria=stopping)
        return self._text(output[0, inputs["input_ids"].shape[1] :])

    def _batches(self, prompts: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """In their order. A batch has no more tokens, pads and answers included, than the conversation `plan` counts.

        Each token has keys and values of its own. A longer prompt is alone. What is free here doesn't matter: the same
        seed draws the same answers.
        """
        batch = []
        for prompt in prompts:
            longest = max(map(len, [*batch, prompt])) + self.options["max_new_tokens"]
            if batch and (len(batch) == AT_ONCE or (len(batch) + 1) * longest > CONVERSATION.tokens):
                yield batch
                batch = []
            batch.append(prompt)
        if batch:
            yield batch

    @torch.no_grad()
    def _answer_at_once(self, prompts: list[torch.Tensor]) -> list[str]:
        """With shorter prompts padded on the left."""
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
        self._draw_anew()
        inputs = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        return [self._text(row[longest:]) for row in self.model.generate(**inputs, **self.options)]

    def _draw_anew(self) -> None:
        if self.options["do_sample"]:
            torch.manual_seed(self.seeds.getrandbits(48))  # all ranks must draw the same token

    def _text(self, tokens: torch.Tensor) -> str:
        """Without what fills a batch up after the end of a short answer."""
        ids = tokens.tolist()
        end = next((place for place, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return self.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()

    def _tokens(self, asked: list[dict] | str, tools: list | None):
        if isinstance(asked, str):
            return self.tokenizer(
                (self.tokenizer.bos_token or "") + asked, add_special_tokens=False, return_tensors="pt"
            )
        try:
            return self.tokenizer.apply_chat_template(
                asked, tools=tools, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except jinja2.TemplateError as error:
            raise UsageError(f"the model's chat template refuses this conversation: {first_line(error)}") from None


def made_to_generate(model, device: torch.device):
    """The sharded model, whose `generate` gathers weights as its forward does."""
    dist.fsdp.register_fsdp_forward_method(model, "generate")
    computes_on(decoder(model), device)
    decoder(model).set_attn_implementation(PADDED_ATTENTION)
    return model


def shared_seed() -> int:
    """A random number, the same on all ranks."""
    number = [secrets.randbits(48)]
    if dist.is_initialized():
        dist.broadcast_object_list(number)
    return number[0]


def _weights_travel(model) -> bool:
    return any(isinstance(module, FSDPModule) for module in getattr(model, "modules", list)())
