"""The decoder layer written out: its gradients in float64 against autograd through plain transformers and PEFT."""

import copy
from itertools import pairwise

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fitune.model import layer as written_out
from fitune.model.activations import keep_activations
from fitune.model.attention import PACKED_ATTENTION
from fitune.model.elementwise import Dropout, factors
from fitune.model.nf4 import STORAGE, NF4Linear
from fitune.model.skeleton import decoder

HIDDEN, KEYS_AND_VALUES, INTERMEDIATE, LAYERS, VOCABULARY = 64, 32, 128, 3, 97
EXACT = 1e-10
"A wrong term is far above this share of a gradient's norm, float64's rounding far below it."
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
SUBSETS = ["all-linear", ATTENTION, MLP, *([name] for name in ATTENTION + MLP)]
SUBSETS += [["q_proj", "v_proj"], ["k_proj", "up_proj"], ["v_proj", "o_proj", "down_proj"], ["q_proj", "gate_proj"]]
PLACES = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 3, "up": 3, "down": 4}
"Linears that share an input share a dropout mask: its number among the four of a layer."


@pytest.fixture
def exact(monkeypatch):
    """transformers' norm in the dtype of its input, where it would compute in float32."""

    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(written_out, "MLP_TILE", 7)


def _randomise(model, names: tuple[str, ...], mean: float) -> None:
    for name, parameter in model.named_parameters():
        if any(part in name for part in names):
            torch.nn.init.normal_(parameter, mean, 0.2)


def _plain(dtype=torch.float64, **options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "pad_token_id": 0}
    config = LlamaConfig(**sizes, attn_implementation="sdpa", **options)  # eager's softmax is in float32
    model = LlamaForCausalLM(config).to(dtype)
    _randomise(model, ("norm",), 1.0)
    _randomise(model, ("bias",), 0.0)
    return model


def _adapted(model, targets="all-linear", dropout: float = 0.0):
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    _randomise(model, ("lora_",), 0.0)
    return model.to(next(model.parameters()).dtype).train()


def _written_out(model, kept: int = LAYERS, *, offload: bool = False):
    """A copy with fitune's layers."""
    model = copy.deepcopy(model)
    causal_lm = decoder(model)
    written_out.use_written_out_layers(causal_lm)
    causal_lm.set_attn_implementation(PACKED_ATTENTION)
    keep_activations(model, kept, offload=offload)
    return model


def _packed(lengths=(8, 5, 1, 7)) -> tuple[dict, dict]:
    """(what fitune's layers get, what plain transformers gets) of one row of several examples."""
    total = sum(lengths)
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    block = torch.full((total, total), float("-inf"), dtype=torch.float64)
    for start, stop in pairwise(bounds.tolist()):
        block[start:stop, start:stop] = block[start:stop, start:stop].triu(1).nan_to_num(nan=0.0, neginf=float("-inf"))
    common = {"position_ids": positions, "use_cache": False, "size": (1, total), "counts": torch.ones(1, total)}
    return common | {"cu_seq_lens_q": bounds, "max_length_q": max(lengths)}, common | {"attention_mask": block[None, None]}


def _padded(lengths=(11, 4, 7)) -> tuple[dict, dict]:
    """The same of rows padded on the right."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    common = {"attention_mask": mask.long(), "use_cache": False, "size": tuple(mask.shape), "counts": mask}
    return common, common


def _run(model, batch: dict, *, seed: int = 0, input_gradient: bool = True, **more) -> dict[str, torch.Tensor]:
    """Logits, the gradient of the first layer's input and the parameters' added to those they have."""
    size, counts = batch["size"], batch["counts"]
    generator = torch.Generator().manual_seed(seed)
    dtype = decoder(model).model.norm.weight.dtype
    x = torch.randn(*size, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.randn(*size, VOCABULARY, generator=generator, dtype=torch.float64).to(dtype)
    counts = counts.unsqueeze(-1).to(dtype)
    inputs = {key: value for key, value in batch.items() if key not in ("size", "counts")} | more
    if "attention_mask" in inputs and inputs["attention_mask"].is_floating_point():
        inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
    logits = model(inputs_embeds=x.requires_grad_(input_gradient), **inputs).logits
    (logits * weights * counts).sum().backward()
    found = {"logits": (logits * counts).detach()} | ({"x": x.grad} if input_gradient else {})
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def _assert_close(found: dict, expected: dict, tolerance: float = EXACT) -> None:
    assert set(found) == set(expected)
    for name, reference in expected.items():
        assert reference.norm() > 0, name
        assert (found[name] - reference).norm() <= tolerance * reference.norm(), name


def _assert_equal(found: dict, expected: dict) -> None:
    assert set(found) == set(expected)
    for name, reference in expected.items():
        assert torch.equal(found[name], reference), name


def _id(targets) -> str:
    return targets if isinstance(targets, str) else "+".join(name.removesuffix("_proj") for name in targets)


@pytest.mark.parametrize("batch", [_packed, _padded])
@pytest.mark.parametrize("targets", SUBSETS, ids=_id)
def test_gradients_are_those_of_autograd(targets, batch, exact):
    ours, theirs = batch()
    reference = _adapted(_plain(), targets)
    expected = _run(copy.deepcopy(reference), theirs)
    for kept in (0, 1, LAYERS):
        _assert_close(_run(_written_out(reference, kept), ours), expected)


@pytest.mark.parametrize("biases", [{"attention_bias": True}, {"mlp_bias": True}])
def test_biases_of_the_base_count(biases, exact):
    ours, theirs = _packed()
    reference = _adapted(_plain(**biases))
    expected = _run(copy.deepcopy(reference), theirs)
    for kept in (0, LAYERS):
        _assert_close(_run(_written_out(reference, kept), ours), expected)


@pytest.mark.parametrize("targets", ["all-linear", ["down_proj"], ["up_proj"]], ids=_id)
def test_tiles_of_the_mlp_add_up(targets, exact, small_tiles):
    for ours, theirs in (_packed(), _padded()):
        reference = _adapted(_plain(), targets)
        expected = _run(copy.deepcopy(reference), theirs)
        for kept in (0, LAYERS):
            _assert_close(_run(_written_out(reference, kept), ours), expected)


def test_micro_batches_add_up(exact):
    reference = _adapted(_plain())
    ours = _written_out(reference, 1)
    for seed, batch in enumerate((_packed, _padded, _packed)):
        found = _run(ours, batch()[0], seed=seed)
        expected = _run(reference, batch()[1], seed=seed)
        _assert_close(found, expected)


def test_kept_recomputed_and_offloaded_are_equal_to_the_last_bit(monkeypatch):
    used = []
    save_on_cpu = written_out.save_on_cpu
    monkeypatch.setattr(written_out, "save_on_cpu", lambda **options: used.append(options) or save_on_cpu(**options))
    reference = _adapted(_plain(torch.float32))
    expected = _run(_written_out(reference, LAYERS), _packed()[0])
    for kept, offload in ((0, False), (1, False), (0, True), (1, True)):
        used.clear()
        _assert_equal(_run(_written_out(reference, kept, offload=offload), _packed()[0]), expected)
        assert len(used) == (LAYERS - kept if offload else 0)


def test_without_a_gradient_of_the_input_the_others_are_the_same():
    """The first layer of a training run: nothing below it learns."""
    for targets in ("all-linear", ["down_proj"], ["q_proj"]):
        reference = _adapted(_plain(torch.float32), targets)
        expected = _run(_written_out(reference, 1), _packed()[0])
        del expected["x"]
        _assert_equal(_run(_written_out(reference, 1), _packed()[0], input_gradient=False), expected)


def test_a_kept_layer_saves_what_its_docstring_says():
    tokens = 21
    found = {}
    for kept in (0, 1):
        sizes = {}
        model = _written_out(_adapted(_plain(torch.float32)), kept)
        x = torch.randn(1, tokens, HIDDEN, requires_grad=True)
        layer = decoder(model).model.layers[-1]
        angles = decoder(model).model.rotary_emb(x, torch.arange(tokens).unsqueeze(0))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
            layer(x, position_embeddings=angles)
        found[kept] = sum(sizes.values()) / tokens
    assert found == {0: HIDDEN, 1: 4 * HIDDEN + 2 * KEYS_AND_VALUES + 2 * INTERMEDIATE}


def _replace_linears(model, by) -> None:
    for layer in model.model.layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, torch.nn.Linear):
                parent, _, child = name.rpartition(".")
                setattr(layer.get_submodule(parent), child, by(module))


def _linear4bit(linear):
    quantised = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    options = {"requires_grad": False, "compress_statistics": True, "quant_type": "nf4"}
    quantised.weight = bnb.nn.Params4bit(linear.weight.detach().clone(), **options).to("cpu")
    return quantised


def _nf4_linear(linear):
    quantised = NF4Linear(linear.in_features, linear.out_features)
    packed, quantised.quant_state = bnb.functional.quantize_4bit(
        linear.weight.detach(), compress_statistics=True, quant_type="nf4"
    )
    quantised.weight.data = packed.view(STORAGE)
    return quantised


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], MLP], ids=_id)
def test_nf4_layers_are_those_of_bitsandbytes(targets, plain_linear4bit):
    ours, theirs = _packed()
    base = _plain(torch.float32)
    models = []
    for by in (_nf4_linear, _linear4bit):
        models.append(copy.deepcopy(base))
        _replace_linears(models[-1], by)
    expected = _run(_adapted(models[1], targets), theirs)
    model = _adapted(models[0], targets)
    for kept in (0, LAYERS):
        # sums of up to 128 products and a few dozen operations in a row, each off by 6e-8 at most
        _assert_close(_run(_written_out(model, kept), ours), expected, tolerance=1e-5)


class _Fixed(torch.nn.Module):
    """Dropout with a mask that is known."""

    def __init__(self, mask: torch.Tensor):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


def _fix_dropout(model, p: float, keys: torch.Tensor, size: tuple[int, int]) -> None:
    for number, layer in enumerate(decoder(model).model.layers):
        for name, place in PLACES.items():
            linear = getattr(layer.mlp if name in ("gate", "up", "down") else layer.self_attn, f"{name}_proj")
            if hasattr(linear, "lora_dropout"):
                mask = factors(Dropout(p, keys, 4 * number + place), linear.in_features)
                linear.lora_dropout["default"] = _Fixed(mask.view(*size, -1))


def _random_keys(size: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(-(2**31), 2**31, (size[0] * size[1],), generator=generator).int()


@pytest.mark.parametrize("batch", [_packed, _padded])
@pytest.mark.parametrize("targets", SUBSETS, ids=_id)
def test_dropout_multiplies_the_adapters_input_by_its_mask(targets, batch, exact, small_tiles):
    ours, theirs = batch()
    keys = _random_keys(ours["size"])
    model = _adapted(_plain(), targets, dropout=0.3)
    found = [_run(_written_out(model, kept), ours, dropout_keys=keys) for kept in (0, 1, LAYERS)]
    _fix_dropout(model, 0.3, keys, ours["size"])
    expected = _run(model, theirs)
    _assert_close(found[0], expected)
    for other in found[1:]:
        _assert_equal(other, found[0])


def test_dropout_needs_keys_in_training_alone(exact):
    model = _adapted(_plain(), dropout=0.3)
    ours, theirs = _packed()
    with pytest.raises(ValueError, match=r"lora\.dropout needs dropout_keys beside the batch"):
        _run(_written_out(model), ours)
    _assert_close(_run(_written_out(model).eval(), ours), _run(model.eval(), theirs))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_an_adapter_switched_off_leaves_the_base(dropout, exact):
    base, (ours, theirs) = _plain(), _packed()
    expected = _run(base, theirs)
    model = _written_out(_adapted(copy.deepcopy(base), dropout=dropout))
    with model.disable_adapter():
        off = _run_forward(model, ours)
    assert (off - expected["logits"]).norm() < EXACT * expected["logits"].norm()
    on = _run_forward(model.eval(), ours)
    assert (on - expected["logits"]).norm() > 0.1 * expected["logits"].norm()


def _run_forward(model, batch: dict) -> torch.Tensor:
    x = torch.randn(*batch["size"], HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        return model(inputs_embeds=x, **{k: v for k, v in batch.items() if k not in ("size", "counts")}).logits


def test_generation_with_a_cache_is_that_of_plain_transformers():
    reference = _adapted(_plain(), dropout=0.3).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    ids = torch.randint(1, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(0))
    expected, found = (model.generate(input_ids=ids, **options) for model in (reference, _written_out(reference)))
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        assert torch.equal(ours, theirs)


def test_a_packed_row_without_the_length_of_its_longest_example_is_refused():
    ours, _ = _packed()
    with pytest.raises(ValueError, match="comes with the length of its longest example"):
        _run(_written_out(_adapted(_plain())), ours | {"max_length_q": None})
