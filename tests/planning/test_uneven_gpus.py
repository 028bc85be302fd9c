"""GPUs that differ: the weakest counts for all of them, in each respect, and the faster part is named with its time."""

from dataclasses import replace

import pytest
from click.testing import CliRunner

from fitune.cli import cli
from fitune.errors import UsageError
from fitune.planning.gpu_models import gpu_model
from fitune.planning.machine import Gpu, Machine
from fitune.planning.search import find, part_alone

LARGE = Gpu("NVIDIA GeForce RTX 4090", 24, 23.5, capability=8.9, link_gb_s=32, identity="a", shown_as="0")
SMALL = Gpu("NVIDIA GeForce RTX 3060", 12, 11.7, capability=8.6, link_gb_s=32, identity="b", shown_as="1")
OLDER = Gpu("NVIDIA GeForce RTX 3090", 24, 23.5, capability=8.6, link_gb_s=32, identity="c", shown_as="2")
NARROW = replace(LARGE, link_gb_s=1.0, identity="d", shown_as="3")
FULL = replace(LARGE, free_gib=0.0, identity="e", shown_as="4")
TWIN = replace(LARGE, identity="f", shown_as="5")


def machine(*gpus: Gpu) -> Machine:
    return Machine(gpus, 128, 120)


def seconds(*gpus: Gpu) -> float:
    return find("llama3_8b_lora", (), machine(*gpus)).plan.time.parts["total"]


def test_every_rate_is_that_of_the_slowest():
    together = machine(LARGE, OLDER, NARROW).model
    slow, narrow = gpu_model("RTX 3090"), NARROW.model
    assert together.name == "RTX 3090" and together.bf16_tflops == slow.bf16_tflops and together.capability == 8.6
    assert (together.host_link_gb_s, together.peer_link_gb_s) == (narrow.host_link_gb_s, narrow.peer_link_gb_s)
    assert together.memory_gb_s == slow.memory_gb_s
    assert machine(LARGE, TWIN).model == LARGE.model == machine(LARGE, TWIN).known_model


def test_one_narrow_link_slows_all_that_exchange_weights():
    narrow_alone = machine(NARROW, replace(NARROW, identity="g"))
    assert seconds(LARGE, NARROW) == find("llama3_8b_lora", (), narrow_alone).plan.time.parts["total"]
    assert seconds(LARGE, NARROW) > 2 * seconds(LARGE, TWIN)


@pytest.mark.parametrize(
    ("gpus", "said", "others"),
    [
        ((LARGE, SMALL), "the GPUs have 23.5, 11.7 GiB free: the smallest counts for all", "0"),
        ((OLDER, LARGE), "the GPUs do 71, 165 TFLOP/s: all wait for the slowest", "0"),
        ((LARGE, NARROW, TWIN), "the GPUs have links of 32, 1, 32 GB/s: all wait for the slowest", "0,5"),
        ((LARGE, FULL), "the GPUs have 23.5, 0 GiB free: the smallest counts for all", "0"),
    ],
)
def test_what_holds_the_others_back_is_said_with_the_part_that_is_faster(gpus, said, others):
    assert machine(*gpus).uneven == said
    assert machine(*gpus).without_the_weakest.in_variable == f"CUDA_VISIBLE_DEVICES={others}"
    line = part_alone("llama3_8b_qlora", (), machine(*gpus))
    assert line.startswith(f"{said}; CUDA_VISIBLE_DEVICES={others} alone: ") and line.endswith(" s a step")


def test_gpus_that_are_alike_have_no_line():
    assert machine(LARGE, TWIN).uneven is None and part_alone("llama3_8b_qlora", (), machine(LARGE, TWIN)) is None
    assert machine().uneven is None and machine(LARGE).uneven is None
    assert machine(LARGE, TWIN).without_the_weakest == machine(LARGE, TWIN)


def test_the_best_part_may_leave_out_more_than_one_kind():
    line = part_alone("llama3_8b_lora", (), machine(SMALL, LARGE, NARROW, TWIN))
    assert "; CUDA_VISIBLE_DEVICES=0,5 alone: 2 GPUs, " in line


def test_a_full_card_refuses_nothing_that_the_others_can_do():
    with pytest.raises(UsageError) as refused:
        find("llama3_8b_qlora", (), machine(LARGE, FULL))
    assert "the smallest counts for all; CUDA_VISIBLE_DEVICES=0 alone: 1 GPU, " in str(refused.value)
    with pytest.raises(UsageError, match="nearest: 1 GPU"):
        find("llama3_70b_full", (), machine(LARGE, FULL))


def test_plan_and_train_say_it(monkeypatch):
    here = machine(LARGE, SMALL, TWIN)
    for module in ("planning.plan_command", "planning.limits", "planning.fill", "launching.fastest_here"):
        monkeypatch.setattr(f"fitune.{module}.this_machine", lambda: here)
    for words in (["plan", "llama3_8b_qlora"], ["train", "llama3_8b_qlora", "--dry-run"]):
        done = CliRunner().invoke(cli, words)
        assert done.exit_code == 0, done.output
        assert "the smallest counts for all; CUDA_VISIBLE_DEVICES=0,5 alone: 2 GPUs, " in done.output


def test_gpus_that_hardly_differ_are_not_tried_in_every_part():
    alike = [replace(LARGE, free_gib=23.5 - n / 100, identity=str(n)) for n in range(16)]
    assert not list(machine(*alike).parts())
    assert len(list(machine(*alike, SMALL).parts())) == 1
