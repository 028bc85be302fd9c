"""GPUs that differ: the weakest counts for all of them, in each respect, and the faster ones may train alone."""

import json
import re
from dataclasses import replace

import pytest
from click.testing import CliRunner

from fitune.cli import cli
from fitune.errors import UsageError
from fitune.launching import doctor
from fitune.launching.fastest_here import on_gpus_here
from fitune.launching.preflight import _check_gpus
from fitune.launching.run_folder import open_run_folder
from fitune.planning.fill import filled_here, resolve
from fitune.planning.gpu_models import gpu_model
from fitune.planning.limits import limits_for_training, machine_of
from fitune.planning.machine import Gpu, Machine
from fitune.planning.search import find

LARGE = Gpu("NVIDIA GeForce RTX 4090", 24, 23.5, capability=8.9, link_gb_s=32, identity="a", shown_as="0")
SMALL = Gpu("NVIDIA GeForce RTX 3060", 12, 11.7, capability=8.6, link_gb_s=32, identity="b", shown_as="1")
OLDER = Gpu("NVIDIA GeForce RTX 3090", 24, 23.5, capability=8.6, link_gb_s=32, identity="c", shown_as="2")
NARROW = replace(LARGE, link_gb_s=1.0, identity="d", shown_as="3")
FULL = replace(LARGE, free_gib=0.0, identity="e", shown_as="4")
TWIN = replace(LARGE, identity="f", shown_as="5")
ONE_COPY = ("profile.replicas=1",)
T4 = Gpu("Tesla T4", 15, 14.5, capability=7.5, link_gb_s=16, identity="t", shown_as="6")


def machine(*gpus: Gpu) -> Machine:
    return Machine(gpus, 128, 120)


def seconds(*gpus: Gpu) -> float:
    """Of a step on all of them."""
    everything = (f"profile.num_gpus={len(gpus)}", "profile.replicas=1")
    return find("llama3_8b_lora", everything, machine(*gpus)).plan.time.parts["total"]


def test_every_rate_is_that_of_the_slowest():
    together = machine(LARGE, OLDER, NARROW).model
    slow, narrow = gpu_model("RTX 3090"), NARROW.model
    assert together.name == "RTX 3090" and together.bf16_tflops == slow.bf16_tflops and together.capability == 8.6
    assert (together.host_link_gb_s, together.peer_link_gb_s) == (narrow.host_link_gb_s, narrow.peer_link_gb_s)
    assert together.memory_gb_s == slow.memory_gb_s
    assert machine(LARGE, TWIN).model == LARGE.model == machine(LARGE, TWIN).known_model


def test_one_narrow_link_slows_all_that_exchange_weights():
    narrow_alone = machine(NARROW, replace(NARROW, identity="g"))
    assert seconds(LARGE, NARROW) == seconds(*narrow_alone.gpus)
    assert seconds(LARGE, NARROW) > 2 * seconds(LARGE, TWIN)


@pytest.mark.parametrize(
    ("gpus", "said", "used", "why"),
    [
        ((LARGE, SMALL, TWIN), "the GPUs have 23.5, 11.7, 23.5 GiB free: the smallest counts for all", "a,f",
         r"GPU 1 \(RTX 3060, 12 GB\) stays idle: with it \d+ s a step instead of \d\.\d"),
        ((OLDER, LARGE), "the GPUs do 71, 165 TFLOP/s: all wait for the slowest", "a",
         r"GPU 2 \(RTX 3090, 24 GB\) stays idle: with it \d+ s a step instead of \d\.\d"),
        ((LARGE, NARROW, TWIN), "the GPUs have links of 32, 1, 32 GB/s: all wait for the slowest", "a,f",
         r"GPU 3 \(RTX 4090, 24 GB, on a link of 1 GB/s\) stays idle: with it \d\.\d s a step instead of \d\.\d"),
        ((FULL, LARGE), "the GPUs have 0, 23.5 GiB free: the smallest counts for all", "a",
         r"GPU 4 \(RTX 4090, 24 GB, 0\.0 GiB free\) stays idle: with it the run does not fit: .* of 0\.0, .*"),
        ((SMALL, LARGE, replace(SMALL, identity="z", shown_as="9"), TWIN), "the GPUs have 11.7, 23.5, 11.7, 23.5 GiB "
         "free: the smallest counts for all", "a,f",
         r"GPUs 1, 9 \(RTX 3060, 12 GB\) stay idle: with them \d+ s a step instead of \d\.\d"),
        ((T4, LARGE), "the GPUs have 14.5, 23.5 GiB free: the smallest counts for all", "a",
         r"GPU 6 \(T4, 15 GB\) stays idle: compute capability 7\.5 has no bf16"),
    ],
)  # fmt: skip
def test_what_holds_the_others_back_stays_idle_and_why_is_said(gpus, said, used, why):
    assert machine(*gpus).uneven == said
    found = find("llama3_8b_qlora", ONE_COPY if NARROW in gpus else (), machine(*gpus))
    assert found.plan.run.accelerate.gpu_ids == used and found.plan.fits and found.uneven is None
    assert ",".join(gpu.identity for gpu in found.plan.used_cards) == used
    assert found.idle == len(gpus) - len(used.split(","))
    assert re.fullmatch(why, found.why_idle()), found.why_idle()
    numbers = ", ".join(gpu.shown_as for gpu in found.plan.used_cards)
    assert f" ({numbers}), " in found.in_one_line()


def test_a_narrow_link_holds_nobody_back_where_weights_do_not_travel():
    found = find("llama3_8b_qlora", (), machine(LARGE, NARROW, TWIN))
    assert (found.plan.setup.replicas, found.idle) == (3, 0) and found.plan.setup.holds_a_whole_copy


def test_the_chosen_gpus_are_filled_as_if_the_others_were_not_there():
    chosen = find("llama3_8b_lora", ONE_COPY, machine(SMALL, LARGE, NARROW, TWIN)).plan
    alone = find("llama3_8b_lora", ONE_COPY, machine(LARGE, TWIN)).plan
    assert chosen.run.accelerate.gpu_ids == "a,f" and alone.run.accelerate.gpu_ids is None
    assert (chosen.setup, chosen.time, chosen.limits) == (alone.setup, alone.time, alone.limits)
    assert chosen.run.profile == alone.run.profile


def test_gpus_that_are_faster_together_than_the_fastest_alone_are_all_taken():
    """A 4090 and a 3090 wait for the 3090, and are still faster with one row each than the 4090 with both."""
    three = machine(OLDER, replace(OLDER, identity="g", shown_as="6"), LARGE)
    found = find("llama3_8b_qlora", (), three)
    assert found.plan.run.accelerate.gpu_ids is None and found.plan.setup.ranks == 3 and found.idle == 0
    assert found.uneven == "the GPUs do 71, 71, 165 TFLOP/s: all wait for the slowest"


def test_no_number_of_gpus_is_tried_on_those_that_are_slower_for_it():
    """16 GPUs of many kinds have many parts, and `plan` answers at once."""
    kinds = [LARGE, SMALL, OLDER, NARROW]
    many = [replace(kinds[n % 4], identity=f"{n:x}", shown_as=str(n), free_gib=11.7 - n % 3 * 3) for n in range(16)]
    assert len(list(machine(*many).parts())) > 10
    found = find("llama3_8b_qlora", (), machine(*many))
    tried = {(plan.setup.ranks, plan.cards) for plan in (found.plan, *found.tried)}
    for ranks, cards in tried:
        assert not any(len(other) >= ranks and set(other) < set(cards) for _, other in tried)
    assert {ranks for ranks, _ in tried} == set(range(1, 17))


def test_gpus_that_are_alike_are_not_named():
    found = find("llama3_8b_qlora", (), machine(LARGE, TWIN))
    assert found.plan.run.accelerate.gpu_ids is None and not found.names_gpus and found.why_idle() is None
    assert machine(LARGE, TWIN).uneven is None and machine().uneven is None and machine(LARGE).uneven is None


def test_all_can_be_asked_for_and_several_machines_take_all():
    everything = find("llama3_8b_qlora", ("profile.num_gpus=3",), machine(LARGE, SMALL, TWIN))
    assert everything.plan.setup.ranks == 3 and everything.plan.run.accelerate.gpu_ids is None
    assert everything.uneven.endswith("the smallest counts for all")
    with pytest.raises(UsageError, match=r"num_gpus=4: this machine has 3$"):
        find("llama3_8b_qlora", ("profile.num_gpus=4",), machine(LARGE, SMALL, TWIN))
    with pytest.raises(UsageError, match="no bf16"):
        find("llama3_8b_qlora", (), machine(LARGE, T4), machines=2)
    two = find("llama3_8b_qlora", ("profile.num_gpus=6",), machine(LARGE, SMALL, TWIN), machines=2)
    assert two.plan.run.accelerate.gpu_ids is None
    assert two.uneven.endswith("; to leave GPUs out, set CUDA_VISIBLE_DEVICES on each machine")


def test_where_nothing_fits_all_gpus_are_described():
    with pytest.raises(UsageError, match=r"does not fit 2 GPUs with 23\.5, 0\.0 GiB free .*; nearest: 1 GPU \(0\), "):
        find("llama3_70b_full", (), machine(LARGE, FULL))


def here(monkeypatch, *gpus: Gpu) -> None:
    monkeypatch.setattr("fitune.planning.hardware.found_here", lambda: machine(*gpus))


def test_plan_and_train_say_it(monkeypatch):
    here(monkeypatch, LARGE, SMALL, TWIN)
    for words in (["plan", "llama3_8b_qlora", "--find"], ["train", "llama3_8b_qlora", "--dry-run"]):
        done = CliRunner().invoke(cli, words)
        assert done.exit_code == 0, done.output
        assert "2 GPUs (0, 5), a copy of the model on each, weights on the GPUs" in done.output
        assert "GPU 1 (RTX 3060, 12 GB) stays idle: with it 26 s a step instead of 4.6" in done.output
        assert "smallest counts" not in done.output
        assert ("gpu_ids: a,f" in done.output) == ("--dry-run" in words)
    planned = CliRunner().invoke(cli, ["plan", "llama3_8b_qlora", "--find"]).output
    assert re.search(r"weights on the GPUs +0, 5 +2 +1 +32/32 +4\.6 s", planned), planned
    assert re.search(r"weights on the GPUs +0, 1, 5 ", planned), planned
    data = json.loads(CliRunner().invoke(cli, ["plan", "llama3_8b_qlora", "--json"]).stdout)
    assert (data["gpu_ids"], data["gpus_there"], data["gpus_idle"]) == ("a,f", 3, 1)


@pytest.mark.parametrize(
    ("gpus", "said"),
    [
        ((LARGE, SMALL), ["uneven GPUs: the GPUs have 23.5, 11.7 GiB free: the smallest counts for all; train leaves "
                          "out those that slow a run down",
                          "fp8: RTX 4090 has it: --set profile.compute=fp8 (see docs/fp8.md); RTX 3060 has none "
                          "(compute capability 8.6, fp8 needs 8.9)"]),
        ((LARGE, T4), ["bf16: Tesla T4 has compute capability 7.5 and no bf16, in which fitune trains (8.0 and later: "
                       "RTX 30, A10, A100, L4 and newer): it stays idle",
                       "fp8: RTX 4090 has it: --set profile.compute=fp8 (see docs/fp8.md)"]),
    ],
)  # fmt: skip
def test_doctor_notes_what_stays_idle_and_finds_nothing_bad(gpus, said, monkeypatch):
    monkeypatch.setattr("fitune.planning.hardware.found_here", lambda: machine(*gpus))
    monkeypatch.setattr(doctor.shutil, "which", lambda program: program)
    monkeypatch.setattr(doctor, "short_of_shared_memory", lambda: None)
    findings = [*doctor._gpus(), *doctor._fp8()]
    assert [f"{finding.name}: {finding.text}" for finding in findings[1:]] == said
    assert all(finding.good is not False for finding in findings)
    fastest = doctor._fastest()[0].text
    assert "plan chose 1 GPU (0), " in fastest and f"GPU {gpus[1].shown_as} (" in fastest and " stays idle: " in fastest


def found_run(tmp_path, *gpus: Gpu):
    return find("llama3_8b_qlora", (), machine(*gpus), output=str(tmp_path / "run")).plan.run


def test_limits_and_rows_are_those_of_the_chosen_gpus(tmp_path, monkeypatch):
    """Also where others take memory of the idle GPU, or of a chosen one, after the choice."""
    run = found_run(tmp_path, SMALL, LARGE, TWIN)
    monkeypatch.delenv("FITUNE_GPU_CAP_GIB", raising=False)
    here(monkeypatch, replace(SMALL, free_gib=0.0), LARGE, TWIN)
    limits = limits_for_training(run)
    assert (limits.gpu, limits.gpus) == (23.5, 2)
    assert machine_of(run).gpus == (LARGE, TWIN) and filled_here(run).profile == run.profile
    here(monkeypatch, SMALL, LARGE, replace(TWIN, free_gib=9.0))
    assert limits_for_training(run).gpu == 9.0


def test_a_profile_takes_the_first_gpus_and_asks_no_others(monkeypatch):
    run = resolve("llama3_8b_qlora", "single_gpu")
    here(monkeypatch, LARGE, FULL, T4)
    assert machine_of(run).gpus == (LARGE,)
    here(monkeypatch, T4, LARGE)
    with pytest.raises(UsageError, match=r"Tesla T4 .* leave it out: CUDA_VISIBLE_DEVICES=0$"):
        _check_gpus(run)


def test_a_profile_says_which_gpus_would_be_faster_for_it(monkeypatch):
    def noted(*gpus: Gpu) -> list[str]:
        here(monkeypatch, *gpus)
        done = CliRunner().invoke(cli, ["train", "llama3_8b_qlora", "--profile", "single_gpu", "--dry-run"])
        assert done.exit_code == 0, done.output
        return [line for line in done.stderr.splitlines() if "faster" in line]

    first = "note: the profile takes the first GPUs, 1 (RTX 3060, 12 GB)"
    assert noted(SMALL, LARGE) == [f"{first}; for faster ones: CUDA_VISIBLE_DEVICES=0"]
    assert noted(LARGE, SMALL) == noted(LARGE, TWIN) == noted(NARROW, LARGE) == []  # one GPU exchanges nothing


def test_a_run_that_goes_on_takes_its_gpus_again_and_others_where_one_is_gone(tmp_path, monkeypatch):
    run = found_run(tmp_path, SMALL, LARGE, TWIN)

    def gpu_ids(*gpus: Gpu) -> str | None:
        here(monkeypatch, *gpus)
        return on_gpus_here(run).accelerate.gpu_ids

    assert gpu_ids(TWIN, SMALL, LARGE, NARROW) == "a,f"
    assert gpu_ids(SMALL, LARGE, OLDER, replace(OLDER, identity="g")) == "a,c"  # one of the two is gone or hidden
    assert gpu_ids(LARGE, replace(LARGE, identity="x")) is None
    assert gpu_ids(LARGE) is None and limits_for_training(on_gpus_here(run)).gpus == 1
    alike = found_run(tmp_path, LARGE, TWIN)
    here(monkeypatch, SMALL, LARGE, TWIN)
    assert on_gpus_here(alike).accelerate.gpu_ids == "a,f"  # a card was added
    of_a_profile = resolve("llama3_8b_qlora", "fsdp_2x40gb", output=str(tmp_path / "run"))
    assert on_gpus_here(of_a_profile) is of_a_profile


@pytest.mark.parametrize("by_folder", [True, False])
def test_train_resume_starts_on_the_gpus_that_are_there(by_folder, tmp_path, monkeypatch):
    run = found_run(tmp_path, SMALL, LARGE, TWIN)
    with open_run_folder(run, resume=False):
        pass
    folder = str(run.folder)
    words = [folder] if by_folder else ["llama3_8b_qlora", "--output", folder]
    for gpus, gpu_ids in (((SMALL, LARGE, TWIN), "a,f"), ((LARGE, SMALL, OLDER, T4), "a,c")):
        here(monkeypatch, *gpus)
        done = CliRunner().invoke(cli, ["train", *words, "--resume", "--dry-run"])
        assert done.exit_code == 0, done.output
        assert f"  gpu_ids: {gpu_ids}\n" in done.stdout


def test_gpus_that_hardly_differ_are_not_tried_in_every_part():
    alike = [replace(LARGE, free_gib=23.5 - n / 100, identity=str(n)) for n in range(16)]
    assert list(machine(*alike).parts()) == [machine(*alike)]
    assert len(list(machine(*alike, SMALL).parts())) == 2
