"""A tiny Llama, or its like, with LoRA twice: as transformers and PEFT compute it, and with fitune's layers."""

import copy
from itertools import pairwise

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fitune.model.activations import keep_activations
from fitune.model.attention import PACKED_ATTENTION
from fitune.model.layer import use_written_out_layers
from fitune.model.skeleton import decoder

HIDDEN, KEYS_AND_VALUES, INTERMEDIATE, LAYERS, VOCABULARY = 64, 32, 128, 3, 97
EXACT = 1e-10
"A wrong term is far above this share of a gradient's norm, float64's rounding far below it."
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
SUBSETS = ["all-linear", ATTENTION, MLP, *([name] for name in ATTENTION + MLP)]
SUBSETS += [["q_proj", "v_proj"], ["k_proj", "up_proj"], ["v_proj", "o_proj", "down_proj"], ["q_proj", "gate_proj"]]


def _randomise(model, names: tuple[str, ...], mean: float) -> None:
    for name, parameter in model.named_parameters():
        if any(part in name for part in names):
            torch.nn.init.normal_(parameter, mean, 0.2)


def plain(dtype=torch.float64, kind: str = "llama", **options) -> PreTrainedModel:
    """transformers' own model, its norms and biases unlike those of a new one."""
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "pad_token_id": 0}
    options = sizes | {"attn_implementation": "sdpa"} | options  # eager's softmax is in float32
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).to(dtype)
    _randomise(model, ("norm",), 1.0)
    _randomise(model, ("bias",), 0.0)
    return model


def adapted(model, targets="all-linear", dropout: float = 0.0):
    """PEFT's adapter around `model`, which it changes; B is random, where it would be zero and hide A."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    _randomise(model, ("lora_",), 0.0)
    return model.to(next(model.parameters()).dtype).train()


def written_out_copy(model, kept: int = LAYERS, **options: bool):
    """A copy with fitune's layers, trained if there is no adapter; the last `kept` of them keep their activations."""
    model = copy.deepcopy(model)
    causal_lm = decoder(model)
    use_written_out_layers(causal_lm, train_base=causal_lm is model)
    causal_lm.set_attn_implementation(PACKED_ATTENTION)
    keep_activations(model, kept, **options)
    return model


def packed(lengths=(8, 5, 1, 7)) -> tuple[dict, dict]:
    """(what fitune's layers get, what plain transformers gets) of one row of several examples."""
    total = sum(lengths)
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    block = torch.full((total, total), float("-inf"), dtype=torch.float64)
    for start, stop in pairwise(bounds.tolist()):
        block[start:stop, start:stop] = torch.full((stop - start, stop - start), float("-inf")).triu(1)
    common = {"position_ids": positions, "use_cache": False, "size": (1, total), "counts": torch.ones(1, total)}
    ours = {"cu_seq_lens_q": bounds, "max_length_q": max(lengths)}
    return common | ours, common | {"attention_mask": block[None, None]}


def padded(lengths=(11, 4, 7)) -> tuple[dict, dict]:
    """The same of rows padded on the right."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    common = {"attention_mask": mask.long(), "use_cache": False, "size": tuple(mask.shape), "counts": mask}
    return common, common


def run(model, batch: dict, *, seed: int = 0, input_gradient: bool = True, **more) -> dict[str, torch.Tensor]:
    """Logits, the gradient of the first layer's input and the parameters' added to those they have."""
    generator = torch.Generator().manual_seed(seed)
    weight = decoder(model).model.norm.weight

    def random(channels):
        return torch.randn(*batch["size"], channels, generator=generator, dtype=torch.float64).to(weight)

    x, weights = random(HIDDEN), random(VOCABULARY)
    counts = batch["counts"].unsqueeze(-1).to(weight)
    inputs = {key: value for key, value in batch.items() if key not in ("size", "counts")} | more
    for key, value in inputs.items():
        if isinstance(value, torch.Tensor):
            inputs[key] = value.to(weight) if value.is_floating_point() else value.to(weight.device)
    logits = model(inputs_embeds=x.requires_grad_(input_gradient), **inputs).logits
    (logits * weights * counts).sum().backward()
    found = {"logits": (logits * counts).detach()} | ({"x": x.grad} if input_gradient else {})
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_close(found: dict, expected: dict, tolerance: float = EXACT) -> None:
    assert set(found) == set(expected)
    for name, reference in expected.items():
        assert reference.norm() > 0, name
        assert (found[name] - reference).norm() <= tolerance * reference.norm(), name


def assert_equal(found: dict, expected: dict) -> None:
    assert set(found) == set(expected)
    for name, reference in expected.items():
        assert torch.equal(found[name], reference), name


def logits(model, batch: dict) -> torch.Tensor:
    """Without gradients."""
    x = torch.randn(*batch["size"], HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        return model(inputs_embeds=x, **{k: v for k, v in batch.items() if k not in ("size", "counts")}).logits


def values_saved(backbone, tokens: int) -> int:
    """How many numbers the last layer of a backbone saves for its backward pass over so many tokens."""
    sizes, x = {}, torch.randn(1, tokens, HIDDEN, requires_grad=True)
    angles = backbone.rotary_emb(x, torch.arange(tokens).unsqueeze(0))

    def count(saved):
        sizes[saved.data_ptr()] = saved.numel()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
        backbone.layers[-1](x, position_embeddings=angles)
    return sum(sizes.values())


def id_of(targets) -> str:
    return targets if isinstance(targets, str) else "+".join(name.removesuffix("_proj") for name in targets)
