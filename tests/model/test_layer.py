"""The decoder layer written out: its gradients in float64 against autograd through plain transformers and PEFT."""

import copy
import itertools
import weakref

import bitsandbytes as bnb
import pytest
import torch
from gpu_kernels import kernels_on_the_cpu
from reference_layers import (
    EXACT,
    HIDDEN,
    INTERMEDIATE,
    KEYS_AND_VALUES,
    LAYERS,
    MLP,
    SUBSETS,
    VOCABULARY,
    adapted,
    assert_close,
    assert_equal,
    id_of,
    logits,
    packed,
    padded,
    plain,
    run,
    values_saved,
    written_out_copy,
)
from rounding import additions_to_gradients, rounding
from torch.multiprocessing.reductions import StorageWeakRef

from fitune.model import attention, elementwise, products
from fitune.model.lora_linears import LoraLinears
from fitune.model.nf4 import STORAGE, NF4Linear
from fitune.model.skeleton import decoder


@pytest.mark.parametrize("batch", [packed, padded])
@pytest.mark.parametrize("targets", SUBSETS, ids=id_of)
def test_gradients_are_those_of_autograd(targets, batch, exact):
    ours, theirs = batch()
    reference = adapted(plain(), targets)
    expected = run(copy.deepcopy(reference), theirs)
    for kept in (0, 1, LAYERS):
        assert_close(run(written_out_copy(reference, kept), ours), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"head_dim": 24},
        {"kind": "mistral"},
        {"kind": "mistral", "head_dim": 24},
        {"kind": "qwen2"},
        {"kind": "qwen3", "head_dim": 16},
        {"kind": "qwen3", "head_dim": 24, "attention_bias": True},
    ],
    ids=str,
)
def test_layers_like_llamas(options, exact):
    """Biases of the base, heads of another size, norms of heads."""
    reference = adapted(plain(**options))
    for ours, theirs in (packed(), padded()):
        expected = run(copy.deepcopy(reference), theirs)
        for kept in (0, LAYERS):
            assert_close(run(written_out_copy(reference, kept), ours), expected)


@pytest.mark.parametrize("options", [{}, {"kind": "qwen3", "head_dim": 16}], ids=["llama", "qwen3"])
@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
def test_gradients_through_the_gpus_attention(kernel, options, exact, monkeypatch):
    """Its kernels get rows with pads, or not, and give their gradients so."""
    reference = adapted(plain(**options))
    ours, theirs = packed()
    expected = run(copy.deepcopy(reference), theirs)
    monkeypatch.setattr(attention, "compute_capability", lambda device: 9.0)
    monkeypatch.setattr(attention, "CUDNN_FROM", 1)
    monkeypatch.setattr(attention, "CUDNN_PADS", 1e9 if kernel == "cudnn" else 0.0)
    for kept in (0, LAYERS):
        with kernels_on_the_cpu() as calls:
            assert_close(run(written_out_copy(reference, kept), ours), expected)
        assert len(calls) == LAYERS * (2 if kept else 3) and all(kernel in call for call in calls)


def test_with_a_cache_layers_compute_as_ever():
    """And beyond a sliding window too, which only rows that are generated may be."""
    for options in ({"kind": "mistral", "sliding_window": 5}, {"kind": "qwen3", "head_dim": 16}, {}):
        model = adapted(plain(**options), dropout=0.0).eval()
        inputs = torch.randint(0, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(0))
        asked = {"input_ids": inputs, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        expected = model.generate(**asked, output_logits=True, return_dict_in_generate=True)
        found = written_out_copy(model).generate(**asked, output_logits=True, return_dict_in_generate=True)
        assert torch.equal(found.sequences, expected.sequences), options
        assert_close(dict(enumerate(found.logits)), dict(enumerate(expected.logits)))


@pytest.mark.parametrize("targets", ["all-linear", ["down_proj"], ["up_proj"]], ids=id_of)
def test_tiles_of_the_mlp_add_up(targets, exact, small_tiles):
    for ours, theirs in (packed(), padded()):
        reference = adapted(plain(), targets)
        expected = run(copy.deepcopy(reference), theirs)
        for kept in (0, LAYERS):
            assert_close(run(written_out_copy(reference, kept), ours), expected)


def test_micro_batches_add_up(exact):
    reference = adapted(plain())
    ours = written_out_copy(reference, 1)
    for seed, batch in enumerate((packed, padded, packed)):
        found = run(ours, batch()[0], seed=seed)
        expected = run(reference, batch()[1], seed=seed)
        assert_close(found, expected)


@pytest.mark.parametrize("change", ["nothing", "one is copied", "one is dropped", "all are dropped"])
def test_later_passes_are_added_by_one_kernel(change, exact, monkeypatch):
    """As long as the gradients lie where the first pass put them; else autograd adds them one by one."""
    reference = adapted(plain())
    expected = run(copy.deepcopy(reference), packed()[1])
    ours, left, gradients = written_out_copy(reference, 1), [], LoraLinears.gradients

    def gradients_for_autograd(linears):
        found = gradients(linears)
        left.append(sum(gradient is not None for gradient in found))
        return found

    monkeypatch.setattr(LoraLinears, "gradients", gradients_for_autograd)
    assert_close(run(ours, packed()[0]), expected)
    trained = [parameter for parameter in ours.parameters() if parameter.requires_grad]
    changed = {"nothing": [], "all are dropped": trained}.get(change, trained[1::14])
    dropped = {id(parameter) for parameter in changed if "dropped" in change}
    for parameter in changed:
        parameter.grad = None if id(parameter) in dropped else parameter.grad.clone()
    found = run(ours, packed()[0])
    assert left == [14] * LAYERS + [14 if changed else 0] * LAYERS
    passes = {name: 1 if id(p) in dropped else 2 for name, p in ours.named_parameters() if p.requires_grad}
    assert_close(found, expected | {name: count * expected[name] for name, count in passes.items()})


def test_kept_recomputed_and_offloaded_are_equal_to_the_last_bit():
    reference = adapted(plain(torch.float32))
    expected = run(written_out_copy(reference, LAYERS), packed()[0])
    for kept, keeps_attention, offload in itertools.product((0, 1), (False, True), (False, True)):
        model = written_out_copy(reference, kept, attention=keeps_attention, offload=offload)
        assert_equal(run(model, packed()[0]), expected)


def test_without_a_gradient_of_the_input_the_others_are_the_same():
    """The first layer of a training run: nothing below it learns."""
    for targets in ("all-linear", ["down_proj"], ["q_proj"]):
        reference = adapted(plain(torch.float32), targets)
        expected = run(written_out_copy(reference, 1), packed()[0])
        del expected["x"]
        assert_equal(run(written_out_copy(reference, 1), packed()[0], input_gradient=False), expected)


KEPT_VALUES = 4 * HIDDEN + 2 * KEYS_AND_VALUES + 2 * INTERMEDIATE + 7 * 4  # seven adapters of rank 4


@pytest.mark.parametrize(
    ("kept", "keeps_attention", "values"), [(0, False, HIDDEN), (0, True, 2 * HIDDEN), (1, False, KEPT_VALUES)]
)
def test_a_layer_saves_what_its_docstring_says(kept, keeps_attention, values):
    backbone = decoder(written_out_copy(adapted(plain(torch.float32)), kept, attention=keeps_attention)).model
    assert values_saved(backbone, 21) == values * 21


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
    quantised.weight.data = packed.view(-1).view(STORAGE).unsqueeze(1)
    return quantised


@pytest.mark.parametrize("key_value_heads", [2, 1])  # with 1 q is larger than k and v together, as in real Llamas
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], MLP], ids=id_of)
def test_nf4_layers_are_those_of_bitsandbytes(targets, key_value_heads, plain_linear4bit):
    ours, theirs = packed()
    base = plain(torch.float32, num_key_value_heads=key_value_heads)
    models = []
    for by in (_nf4_linear, _linear4bit):
        models.append(copy.deepcopy(base))
        _replace_linears(models[-1], by)
    expected = run(adapted(models[1], targets), theirs)
    model = adapted(models[0], targets)
    length = ours["size"][1]
    additions = additions_to_gradients(base.config, length, tokens=length)
    for kept in (0, LAYERS):
        assert_close(run(written_out_copy(model, kept), ours), expected, tolerance=rounding(additions))


def test_one_dequantised_weight_is_there_at_a_time(monkeypatch):
    """0.44 GiB each at 70B, of gate, up and down."""
    there, dequantise = [], products.weight

    def weight(base, dtype, out=None):
        assert out is not None or not any(reference() is not None for reference in there)
        found = dequantise(base, dtype, out)
        there.append(weakref.ref(found))
        return found

    monkeypatch.setattr(products, "weight", weight)
    base, (ours, _) = plain(torch.float32), packed()
    _replace_linears(base, _nf4_linear)
    for kept in (0, LAYERS):
        run(written_out_copy(adapted(base), kept), ours)
    assert len(there) > 7 * LAYERS


def test_a_tile_finds_room_where_attention_and_the_tile_before_were(small_tiles, monkeypatch):
    """8B in rows of 49,152 tokens had 1.8 GiB of both beside each of its tiles."""
    gone, attend, swiglu, before = [], attention.forward, elementwise.swiglu, []

    def attention_forward(heads, *others):
        before.append(StorageWeakRef(heads.untyped_storage()))  # q, k and v
        return attend(heads, *others)

    def product_of(gate_up, dropout):
        gone.append(all(storage.expired() for storage in before))
        found = swiglu(gate_up, dropout)
        before.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in (gate_up, *found) if tensor is not None)
        return found

    monkeypatch.setattr(attention, "forward", attention_forward)
    monkeypatch.setattr(elementwise, "swiglu", product_of)
    base, (ours, _) = plain(), packed()
    keys = torch.arange(ours["position_ids"].numel(), dtype=torch.int32)
    logits(written_out_copy(adapted(base, dropout=0.2), kept=0).train(), ours | {"dropout_keys": keys})
    assert gone == [True] * 3 * LAYERS


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_an_adapter_switched_off_leaves_the_base(dropout, exact):
    base, (ours, theirs) = plain(), packed()
    expected = logits(base, theirs)
    model = written_out_copy(adapted(copy.deepcopy(base), dropout=dropout))
    with model.disable_adapter():
        off = logits(model, ours)
    assert (off - expected).norm() < EXACT * expected.norm()
    on = logits(model.eval(), ours)
    assert (on - expected).norm() > 0.1 * expected.norm()


def test_generation_with_a_cache_is_that_of_plain_transformers():
    reference = adapted(plain(), dropout=0.3).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    ids = torch.randint(1, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(0))
    expected, found = (model.generate(input_ids=ids, **options) for model in (reference, written_out_copy(reference)))
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        assert torch.equal(ours, theirs)  # its own code with its own shapes


def test_a_packed_row_without_the_length_of_its_longest_example_is_refused():
    ours, _ = packed()
    with pytest.raises(ValueError, match="comes with the length of its longest example"):
        run(written_out_copy(adapted(plain())), ours | {"max_length_q": None})
