"""What the docs' prose says that `plan` says, it says today. (Tables between marks are written by scripts.)

Of docs/memory.md: `test_figures_in_memory_md.py`.
"""

from dataclasses import replace

import pytest
from planned import SMALL, gpu_gib, host_gib, one_line, planned, speed, step

from fitune.planning.gpu_models import gpu_model
from fitune.planning.limits import given_machine
from fitune.planning.machine import Gpu, Machine
from fitune.planning.memory import gpu_peak
from fitune.planning.network import ways_to_spread
from fitune.planning.plan import Plan
from fitune.planning.search import find
from fitune.planning.words import rounded


def test_the_tutorial():
    page, two = one_line("tutorial.md"), planned("llama3.3_70b_qlora", "fsdp_offload_2x24gb")
    assert f"`plan` says {gpu_gib(two)} GiB on each GPU and {host_gib(two)} GiB of RAM" in page
    assert f"for RTX 4090s it estimates {step(two)} a step" in page
    one = find("llama3.1_8b_qlora", (), given_machine(1, 24, 32), gpu_model("RTX 4090")).plan
    assert f"On an RTX 4090 it estimates {one.time.parts['total']:.0f} s a step" in page


def test_the_real_cards_in_the_readme():
    def on(card: str, recipe: str, gpus: int, memory: int) -> str:
        return speed(find(recipe, (), given_machine(gpus, memory, 64), gpu_model(card)).plan)

    of_8b = [on(card, "llama3_8b_qlora", 1, 24) for card in ("RTX 4090", "RTX 3090")]
    of_70b = [on(*each) for each in (("RTX 4090", "llama3_70b_qlora", 4, 24), ("RTX 3060", "llama3_70b_qlora", 1, 12))]
    said = "On an RTX 4090 `plan` estimates {} tokens/s, on an RTX 3090 {}; ".format(*of_8b)
    said += "of 70B, {} on four RTX 4090, {} on one RTX 3060.".format(*of_70b)
    assert said in one_line("../README.md")


@pytest.mark.parametrize("compute", ["bf16", "fp8"])
@pytest.mark.parametrize(
    ("recipe", "profile"), [("llama3_8b_lora", "fsdp_1x48gb"), ("llama3_70b_lora", "fsdp_lora_8x80gb")]
)
def test_lora_in_fp8(recipe, profile, compute):
    one_row = ("profile.micro_batch=1", "profile.kept_layers=0", "profile.embedding_offload=false")
    on_gpus = (*one_row, "profile.activation_offload=false")
    setup = planned(recipe, profile, (*on_gpus, f"profile.compute={compute}")).setup
    ranks = (
        replace(setup, ranks=cards, accumulation=-(-8 // cards), adapters_wait=False, replicas=1)
        for cards in (1, 2, 3, 4, 8)
    )
    of_cards = [f"{gpu_peak(setup).total / 2**30:.1f}" for setup in ranks]
    assert f"| `{recipe}` | `{compute}` | {' | '.join(of_cards)} |" in one_line("fp8.md")
    if recipe == "llama3_70b_lora":
        on_four, on_three, on_two = of_cards[3], of_cards[2], of_cards[1]
        text = f"{on_four} GiB on each of four, {on_three} on each of three"
        assert (text if compute == "bf16" else f"it takes {on_two} on each of two") in one_line("memory.md")


@pytest.mark.parametrize(("gpus", "card", "memory"), [(2, "H100", 79.6), (4, "RTX 5090", 32), (1, "H100", 79.6)])
def test_where_70b_lora_fits_in_fp8(gpus, card, memory):
    """On the GPUs, where bf16 has no room; on one of them it is faster in host RAM."""

    def on_gpus(compute: str) -> list[Plan]:
        sets = (f"profile.compute={compute}", f"profile.num_gpus={gpus}", "profile.activation_offload=false")
        found = find("llama3_70b_lora", sets, given_machine(gpus, memory, 256), gpu_model(card))
        assert found.plan.setup.offload == (compute == "bf16" or gpus == 1)
        return [plan for plan in (found.plan, *found.tried) if plan.fits and not plan.setup.offload]

    assert on_gpus("fp8") and not on_gpus("bf16")


def test_how_tight_the_largest_profile_is():
    page = one_line("clusters.md")
    exact, small = (planned("llama3_70b_full", "fsdp_full_16x80gb", sets) for sets in ((), SMALL))
    assert f"fills {gpu_gib(exact)} of the {exact.limits.gpu} GiB" in page
    assert f"`bf16_8bit` leaves {small.limits.gpu - small.gpu.total / 2**30:.1f} GiB" in page


@pytest.mark.parametrize(
    ("row", "recipe", "sets"),
    [
        ("70B qlora, 16 rows a step", "llama3_70b_qlora", ("global_batch_size=16",)),
        ("70B full, float32 states", "llama3_70b_full", ("profile.optimizer_state=fp32",)),
        ("70B full, `profile.optimizer_state=bf16_8bit`", "llama3_70b_full", SMALL),
    ],
)
def test_what_the_network_costs(row, recipe, sets):
    sets = (*sets, "profile.num_gpus=16")
    machine = given_machine(8, 79.6, 512)

    def planned(changed=()):
        return find(recipe, (*sets, *changed), machine, machines=2).plan

    ways = ways_to_spread(planned(), planned)
    by_kind = {way.plan.setup.replicas > 1: way.plan for way in ways[:2]}
    seconds = {
        kind: f"{rounded(plan.time.parts['network'])} s" if plan.fits else "does not fit"
        for kind, plan in by_kind.items()
    }
    computing = rounded(ways[0].plan.time.parts["compute"])
    assert f"| {row} | {seconds[False]} | {seconds[True]} | {computing} s |" in one_line("clusters.md")


def test_the_faster_part_of_uneven_gpus():
    large, small = Gpu("NVIDIA GeForce RTX 4090", 24, 23.5), Gpu("NVIDIA GeForce RTX 3060", 12, 11.7)
    gpus = (replace(gpu, identity=str(n)) for n, gpu in enumerate((large, small, large)))
    found = find("llama3_8b_qlora", (), Machine(tuple(gpus), 128, 120))
    three = next(plan for plan in found.tried if plan.setup.ranks == 3)
    assert found.plan.setup.ranks == 2
    said = f"two RTX 4090 beside an RTX 3060 take {step(found.plan)} a step, all three {step(three)}"
    assert said in one_line("machines.md")
