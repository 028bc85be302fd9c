"""A large GPU that FITUNE_GPU_CAP_GIB holds to a small card is one for every command."""

from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from torch.cuda._utils import _get_device_index

from fitune.cli import cli
from fitune.errors import UsageError
from fitune.launching import doctor, preflight
from fitune.planning import limits
from fitune.planning.fill import resolve
from fitune.planning.machine import Gpu, Machine
from fitune.training.distributed import hold_to_cap

CAP = "FITUNE_GPU_CAP_GIB"


@pytest.fixture
def one_h200(monkeypatch) -> Machine:
    machine = Machine((Gpu("NVIDIA H200", 140, 139),), 200, 190)
    monkeypatch.setattr("fitune.planning.hardware.found_here", lambda: machine)
    monkeypatch.setattr(limits, "free_disk_gib", lambda _: 1000.0)
    monkeypatch.delenv(CAP, raising=False)
    return machine


def test_ranks_that_share_a_gpu_are_checked_against_their_cap(one_h200, monkeypatch, tmp_path):
    run = resolve("llama3_70b_qlora", "fsdp_4x24gb", output=str(tmp_path / "run"))
    with pytest.raises(UsageError, match="GPUs: needs 4, has 1"):
        preflight.check_fits(run)
    monkeypatch.setenv(CAP, "20.5")
    preflight.check_fits(run)
    monkeypatch.setenv(CAP, "12")
    with pytest.raises(UsageError, match="GPU memory"):
        preflight.check_fits(run)


def test_the_search_for_the_fastest_way_finds_what_fits_the_small_card(one_h200, monkeypatch):
    said = {}
    for cap in (None, "9.7"):
        monkeypatch.setenv(CAP, cap) if cap else monkeypatch.delenv(CAP, raising=False)
        for words in (["train", "llama3_8b_qlora", "--dry-run"], ["plan", "llama3_8b_qlora"]):
            done = CliRunner().invoke(cli, words, catch_exceptions=False)
            assert done.exit_code == 0, done.output
            said[cap, words[0]] = done.output
    assert "free_gpu_gib: 139" in said[None, "train"] and "gpu_memory_gib: 11.0" in said["9.7", "train"]
    all_kept = "kept_layers: 32\n"
    assert all_kept in said[None, "train"] and all_kept not in said["9.7", "train"]
    assert "of 11.0" in said["9.7", "plan"] and "of 139" in said[None, "plan"]


@pytest.mark.parametrize(("device", "index"), [("cuda", 1), ("cuda:0", 0), ("cpu", None)])
def test_a_process_gets_no_more_of_the_gpu_that_it_computes_on(device, index, monkeypatch):
    """Of plain "cuda", as a model's folder is asked, torch's setter does not know which that is."""
    held = []
    monkeypatch.setenv(CAP, "10")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=40 * 2**30))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, gpu: held.append((share, _get_device_index(gpu)))
    )
    hold_to_cap(torch.device(device))
    assert held == ([] if index is None else [(0.25, index)])


def test_doctor_says_that_gpus_count_as_small_ones(one_h200, monkeypatch):
    assert doctor._gpu_cap() == []
    monkeypatch.setenv(CAP, "22")
    monkeypatch.setattr(doctor.shutil, "which", lambda program: program)
    gpus, cap = *doctor._gpus(), *doctor._gpu_cap()
    assert gpus.text.startswith("NVIDIA H200, 23.3 GiB (23.3 free)")
    assert cap.text == f"{CAP}=22: each GPU counts as a small card, of which torch takes 22 GiB"
    assert cap.good is None and cap.fix == f"unset {CAP} to use all of its memory"
