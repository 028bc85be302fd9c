"""Layers' inputs in host RAM: the same numbers, travelling in this order, in RAM that is used again."""

import pytest
import torch
from reference_layers import HIDDEN, LAYERS, adapted, assert_equal, packed, padded, plain, run, written_out_copy

from fitune.model import attention, host_inputs
from fitune.model.host_inputs import HostInputs


@pytest.fixture
def travels(monkeypatch) -> list[str]:
    """What happens: which input leaves, starts to come back and is asked for, counted from the pass's first."""
    happened, numbers = [], {}
    offload, start, fetch = HostInputs.offload, HostInputs._start, HostInputs.fetch

    def watched_offload(self, tensors, waiting=None):
        joins, waiting = waiting is not None, offload(self, tensors, waiting)
        if not joins:
            numbers[id(waiting)] = len([entry for entry in happened if entry.startswith("out")]) % LAYERS
            happened.append(f"out {numbers[id(waiting)]}")
        return waiting

    def watched_start(self, waiting):
        if waiting.arriving is None:
            happened.append(f"in {numbers[id(waiting)]}")
        start(self, waiting)

    def watched_fetch(self, waiting):
        happened.append(f"for {numbers[id(waiting)]}")
        return fetch(self, waiting)

    for name, watched in (("offload", watched_offload), ("_start", watched_start), ("fetch", watched_fetch)):
        monkeypatch.setattr(HostInputs, name, watched)
    return happened


OUT = ["out 0", "out 1", "out 2"]


def test_the_input_of_the_layer_before_comes_back_while_a_layer_computes(travels):
    model = written_out_copy(adapted(plain(torch.float32)), 0, offload=True)
    for _ in range(2):
        run(model, packed()[0])
        assert travels == [*OUT, "for 2", "in 2", "in 1", "for 1", "in 0", "for 0"]
        travels.clear()


def test_a_large_input_comes_back_when_its_layer_asks(travels, monkeypatch):
    monkeypatch.setattr(host_inputs, "INPUT_AHEAD_BYTES", 0)
    run(written_out_copy(adapted(plain(torch.float32)), 0, offload=True), packed()[0])
    assert travels == [*OUT, "for 2", "in 2", "for 1", "in 1", "for 0", "in 0"]


def test_only_recomputed_layers_send_theirs_and_none_without_gradients(travels):
    model = written_out_copy(adapted(plain(torch.float32)), LAYERS - 1, offload=True)
    run(model, packed()[0])
    assert travels == ["out 0", "for 0", "in 0"]
    travels.clear()
    with torch.no_grad():
        model(inputs_embeds=torch.randn(1, 9, HIDDEN), use_cache=False)
    assert travels == []


def test_trained_layers_send_theirs_too(travels):
    """Method full's."""
    model, batch = plain(torch.float32).train(), padded()[0]
    model.model.embed_tokens.requires_grad_(False)
    expected = run(written_out_copy(model), batch)
    for kept, travelled in ((0, LAYERS), (1, LAYERS - 1), (LAYERS, 0)):
        assert_equal(run(written_out_copy(model, kept, offload=True), batch), expected)
        assert [entry for entry in travels if entry.startswith("out")] == OUT[:travelled]
        travels.clear()


def test_ram_is_used_again_in_the_next_pass_and_replaced_by_a_longer_one(monkeypatch):
    sizes = []
    host_zeros = host_inputs.host_zeros
    monkeypatch.setattr(
        host_inputs, "host_zeros", lambda shape, *rest: sizes.append(shape[0]) or host_zeros(shape, *rest)
    )
    reference = adapted(plain(torch.float32))
    model, recomputed = written_out_copy(reference, 0, offload=True), written_out_copy(reference, 0)
    input_bytes = HIDDEN * 4  # of a token
    for seed, (lengths, new) in enumerate((((8, 5), LAYERS), ((4, 3), 0), ((8, 5), 0), ((8, 9), LAYERS), ((8, 5), 0))):
        batch = packed(lengths)[0]
        assert_equal(run(model, batch, seed=seed), run(recomputed, batch, seed=seed))
        assert sizes == [sum(lengths) * input_bytes] * new
        sizes.clear()


def test_attentions_result_travels_with_the_input_and_is_not_computed_again(travels, monkeypatch):
    computed = []
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *args: computed.append(1) or forward(*args))
    reference = adapted(plain(torch.float32))
    expected = run(written_out_copy(reference, LAYERS), packed()[0])
    assert len(computed) == LAYERS
    for keeps, times in ((False, 2), (True, 1)):
        for offload in (False, True):
            computed.clear()
            travels.clear()
            assert_equal(run(written_out_copy(reference, 0, attention=keeps, offload=offload), packed()[0]), expected)
            assert len(computed) == times * LAYERS
            assert travels == ([*OUT, "for 2", "in 2", "in 1", "for 1", "in 0", "for 0"] if offload else [])


def test_what_no_backward_pass_asks_for_does_not_leave(travels):
    """Below the first layer that has an adapter."""
    model = written_out_copy(adapted(plain(torch.float32), ["layers.2.mlp.up_proj"]), 0, offload=True)
    run(model, packed()[0], input_gradient=False)
    assert travels == ["out 0", "for 0", "in 0"]


def test_ram_of_one_kind_is_not_taken_for_another():
    """cuDNN's sums have the length of padded rows, which moves while the number of tokens stays."""
    host_inputs, held = HostInputs(), []
    for length in (100, 105, 103, 112, 101):
        sizes = [(1600,), (1600,), (length,)]
        waiting = [host_inputs.offload([torch.ones(size) for size in sizes]) for _ in range(3)]
        held.append(sum(len(room) for one in waiting for room in one.rooms.values()))
        for one in reversed(waiting):
            assert [part.shape for part in host_inputs.fetch(one)] == sizes
    assert held == [3 * 4 * (3200 + longest) for longest in (100, 105, 105, 112, 112)]


def test_a_second_backward_pass_is_refused():
    model = written_out_copy(adapted(plain(torch.float32)), 0, offload=True)
    loss = model(inputs_embeds=torch.randn(1, 9, HIDDEN), use_cache=False).logits.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass a forward pass"):
        loss.backward()
