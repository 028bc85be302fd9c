"""Which GPUs count and what they can do: by the answers of fake nvidia-smi programs."""

import json

import pytest
from click.testing import CliRunner
from fake_nvidia_smi import CARD, card

from fitune.cli import cli
from fitune.errors import UsageError
from fitune.launching import doctor
from fitune.planning import hardware
from fitune.planning.fill import resolve
from fitune.planning.gpu_models import gpu_model
from fitune.planning.hardware import this_machine
from fitune.planning.limits import limits_here
from fitune.planning.machine import Machine
from fitune.planning.search import find


def test_every_card_is_read_with_what_others_leave_free_and_its_link(nvidia_smi):
    nvidia_smi([card(1), card(2, memory__free="9000", **{"pcie__link__width__current": "4"})])
    first, second = this_machine().gpus
    assert (first.name, round(first.total_gib, 2), first.capability, first.link_gb_s) == (CARD[1], 23.99, 8.9, 32)
    assert second.link_gb_s == 8 and round(second.free_gib, 2) == 8.79
    assert this_machine().gpu_memory_gib == second.free_gib
    assert second.model.host_link_gb_s == 8 and second.model.peer_link_gb_s == 4
    assert first.model == gpu_model("RTX 4090")


def test_a_link_of_four_lanes_decides_against_weights_in_ram(nvidia_smi):
    seconds, placed = {}, {}
    for lanes in ("16", "4"):
        nvidia_smi([card(1, **{"pcie__link__width__current": lanes})])
        machine = Machine(this_machine().gpus, 128, 120)
        seconds[lanes] = find("llama3_70b_qlora", (), machine).plan.time.parts["host link"]
        placed[lanes] = find("llama3_8b_lora", (), machine).plan.setup.offload
    assert seconds["4"] == pytest.approx(4 * seconds["16"])
    assert placed == {"16": True, "4": False}


def test_a_link_of_one_lane_decides_against_weights_that_are_gathered(nvidia_smi):
    """Not against copies of the model, between which adapters travel once a step."""
    used = {}
    for lanes in ("16", "1"):
        nvidia_smi([card(n, **{"pcie__link__width__current": lanes}) for n in (1, 2)])
        here = Machine(this_machine().gpus, 128, 120)
        found = find("llama3_8b_lora", ("profile.replicas=1",), here)
        used[lanes] = found.plan.setup.ranks
    assert used == {"16": 2, "1": 1}
    assert find("llama3_8b_qlora", (), here).plan.setup.replicas == 2
    assert found.why_idle().startswith("1 of 2 GPUs stays idle: with 2 GPUs, one copy of the model, weights on the ")
    assert found.why_idle().endswith(" s a step") and "it is slower" in found.why_idle()


def test_old_drivers_are_asked_for_less(nvidia_smi):
    nvidia_smi([card(1)], knows_all_fields=False)
    [gpu] = this_machine().gpus
    assert gpu.capability is None and gpu.link_gb_s is None and gpu.model == gpu_model("RTX 4090")


def test_no_nvidia_smi_or_one_that_fails_is_no_gpu(nvidia_smi, tmp_path, monkeypatch):
    nvidia_smi([])
    assert this_machine().gpus == ()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert this_machine().gpus == ()


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "1234"), ("0,2", "13"), ("2,0", "31"), ("GPU-2222", "2"), ("", ""), ("1,9,0", "2"), ("-1", ""),
     (" 1 , 2 ", "23"), ("GPU-2,GPU-4", "24"), ("1,-1,0", "2"), ("0,0", ""), ("GPU-2,1", "2"), ("1,GPU-2", "2")],
)  # fmt: skip
def test_only_visible_gpus_count_in_their_order(value, shown, nvidia_smi, monkeypatch):
    nvidia_smi([card(n) for n in (1, 2, 3, 4)])
    if value is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert "".join(gpu.identity[-1] for gpu in this_machine().gpus) == shown


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("9", "there is no GPU 9 here, and CUDA shows none; there are: 0, 1, 2, 3"),
        ("1,9,0", "there is no GPU 9 here, and CUDA shows those before it alone; there are: 0, 1, 2, 3"),
        ("all", "there is no GPU all here, and CUDA shows none"),
        ("GPU-2,1", "numbers and UUIDs don't mix, and CUDA shows those before it alone"),
        ("2,2", "names a GPU twice, and CUDA then shows none; name each once"),
        ("", "CUDA_VISIBLE_DEVICES= shows no GPU: try tiny_qlora with --profile cpu_2proc"),
        ("-1", "CUDA_VISIBLE_DEVICES=-1 shows no GPU"),
    ],
)
def test_gpus_that_are_asked_for_and_not_there_are_refused(value, said, nvidia_smi, monkeypatch):
    """CUDA shows those before them alone, without a word: fewer would train than were meant."""
    nvidia_smi([card(n) for n in (1, 2, 3, 4)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    for command in (["plan", "llama3_8b_qlora"], ["train", "llama3_8b_qlora", "--dry-run"]):
        done = CliRunner().invoke(cli, command)
        assert done.exit_code == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.output
    [finding] = doctor._gpus()
    assert finding.name == "GPUs" and finding.good is False
    assert finding.text in done.stderr or finding.fix == "unset CUDA_VISIBLE_DEVICES"


def test_hidden_gpus_do_not_stop_what_is_planned_elsewhere(nvidia_smi, monkeypatch):
    nvidia_smi([card(1)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9")
    assert CliRunner().invoke(cli, ["plan", "llama3_8b_qlora", "--gpu", "RTX 4090"]).exit_code == 0


def test_of_cards_of_different_sizes_the_smallest_counts_and_a_line_says_so(nvidia_smi):
    small = {"name": "NVIDIA GeForce RTX 3060", "memory__total": "12288", "memory__free": "12000", "compute_cap": "8.6"}
    nvidia_smi([card(1), card(2, **small), card(3)])
    machine = this_machine()
    assert machine.gpu_memory_gib == pytest.approx(12000 / 1024) and machine.model.name == "RTX 3060"
    assert machine.uneven == "the GPUs have 23.5, 11.7, 23.5 GiB free: the smallest counts for all"
    nvidia_smi([card(1), card(2)])
    assert this_machine().uneven is None


def test_gpus_are_named_as_cuda_names_them_where_some_are_hidden_already(nvidia_smi, monkeypatch):
    nvidia_smi([card(1), card(2), card(3, memory__free="9000"), card(4)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,2,1")
    found = find("llama3_8b_lora", (), this_machine())
    assert " (3, 1), " in found.in_one_line() and found.plan.run.accelerate.gpu_ids == "GPU-4444,GPU-2222"
    nvidia_smi([card(1), card(2), card(3, name="Tesla T4", compute_cap="7.5"), card(4)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,2,1")
    with pytest.raises(UsageError, match=r"leave it out: CUDA_VISIBLE_DEVICES=3,1$"):
        this_machine().refuse_missing_bf16()


SPARK = {"name": "NVIDIA GB10", "memory__total": "[N/A]", "memory__free": "[N/A]", "compute_cap": "12.1",
         "pcie__link__gen__max": "[N/A]", "pcie__link__width__current": "[N/A]"}  # fmt: skip


def test_memory_that_cpu_and_gpu_share_is_counted_once(nvidia_smi, monkeypatch):
    monkeypatch.setattr(hardware, "host_memory_gib", lambda: (119.7, 100.0))
    nvidia_smi([card(1, **SPARK)])
    machine = this_machine()
    assert machine.unified and machine.gpu_memory_gib == 100.0
    plan = find("llama3_70b_qlora", (), machine).plan
    [verdict] = plan.verdicts
    assert verdict.resource == "memory of CPU and GPU" and verdict.has == 100.0
    host = sum(plan.host[plan.host_phase].values())
    assert verdict.needs == pytest.approx((plan.gpu.total + host) / 2**30) and verdict.needs <= 100 / 1.05
    assert not (plan.setup.offload or plan.setup.embedding_offload or plan.setup.activation_offload)
    with pytest.raises(UsageError, match=r"memory of CPU and GPU: needs \d+"):
        find("llama3_70b_qlora", (), Machine(machine.gpus, 40, 40))
    assert limits_here(machine).unified


@pytest.mark.parametrize(("name", "capability"), [("Tesla T4", "7.5"), ("Tesla V100-SXM2-16GB", "7.0"), ("Foo", "7.5")])
def test_gpus_without_bf16_are_refused_in_plan_doctor_and_train_with_what_to_do(name, capability, nvidia_smi, tmp_path):
    nvidia_smi([card(1, name=name, memory__total="15360", memory__free="15000", compute_cap=capability)])
    run = CliRunner().invoke
    train = ["train", "llama3_8b_qlora", "--dry-run"]
    for command in (["plan", "llama3_8b_qlora"], train, [*train, "--profile", "single_gpu"]):
        result = run(cli, command)
        assert result.exit_code == 2, result.output
        assert f"{name} has compute capability {capability} and no bf16" in result.stderr
        assert result.stderr.count("\n") == 1
    nvidia_smi([card(1), card(2, name=name, compute_cap=capability)])
    assert find("llama3_8b_qlora", (), this_machine()).plan.run.accelerate.gpu_ids == "GPU-1111"
    [note] = [finding for finding in doctor._gpus() if finding.name == "bf16"]
    assert note.good is None and note.text.endswith(": it stays idle") and not note.fix


def test_a_profile_does_not_get_past_a_gpu_without_bf16(nvidia_smi, tmp_path):
    from fitune.launching.preflight import _check_gpus

    nvidia_smi([card(1, name="Tesla T4", compute_cap="7.5")])
    with pytest.raises(UsageError, match="no bf16"):
        _check_gpus(resolve("llama3_8b_qlora", "single_gpu"))
    _check_gpus(resolve("tiny_qlora", "cpu_2proc", ("base.model=meta-llama/Llama-3.2-1B",)))


def test_a_gpu_that_the_table_does_not_have_is_not_timed_as_another(nvidia_smi):
    nvidia_smi([card(1, name="NVIDIA Unheard Of", compute_cap="13.0")])
    result = CliRunner().invoke(cli, ["plan", "llama3_8b_qlora"])
    assert result.exit_code == 0, result.output
    assert "time not predicted" in result.output and "s a step" not in result.output
    assert "'NVIDIA Unheard Of' is not in the table of GPUs; give --gpu-tflops N" in result.output
    estimate = json.loads(CliRunner().invoke(cli, ["plan", "llama3_8b_qlora", "--json"]).output)["estimate"]
    assert estimate is None
