"""The GPUs that a run's accelerate.yaml names are those that its ranks see, whoever starts it."""

import os

import pytest
from accelerate.commands import launch as accelerate_launch
from accelerate.utils.launch import prepare_multi_gpu_env

from fitune.config.accelerate_config import read_accelerate_config
from fitune.config.schema import Run
from fitune.errors import UsageError
from fitune.launching import launch
from fitune.launching.run_folder import open_run_folder
from fitune.planning.machine import Gpu, Machine
from fitune.planning.search import find

SMALL = Gpu("NVIDIA GeForce RTX 3060", 12, 11.7, identity="GPU-0000", shown_as="0")
LARGE = Gpu("NVIDIA GeForce RTX 4090", 24, 23.5, identity="GPU-1111", shown_as="1")
TWIN = Gpu("NVIDIA GeForce RTX 4090", 24, 23.5, identity="GPU-2222", shown_as="2")
VISIBLE = "CUDA_VISIBLE_DEVICES"


def run_of(folder, *gpus: Gpu) -> Run:
    """A run that was searched for on these GPUs, its folder written."""
    run = find("llama3_8b_qlora", (), Machine(gpus, 128, 120), output=str(folder)).plan.run
    with open_run_folder(run, resume=False):
        return run


def seen_by_ranks(*flags: str) -> str | None:
    """CUDA_VISIBLE_DEVICES as accelerate sets it for its processes."""
    parsed = accelerate_launch.launch_command_parser().parse_args([*flags, "-m", "module"])
    return prepare_multi_gpu_env(accelerate_launch._validate_launch_command(parsed)[0]).get(VISIBLE)


@pytest.fixture(params=[None, "2,1", "GPU-2222,GPU-1111,GPU-0000"])
def given(request, monkeypatch) -> str | None:
    """What the user has set."""
    monkeypatch.delenv(VISIBLE, raising=False)
    if request.param:
        monkeypatch.setenv(VISIBLE, request.param)
    return request.param


@pytest.mark.parametrize(("gpus", "named"), [((SMALL, LARGE, TWIN), "GPU-1111,GPU-2222"), ((SMALL, TWIN), "GPU-2222")])
def test_plain_accelerate_shows_its_ranks_the_chosen_gpus_beside_any_setting(gpus, named, given, tmp_path):
    run = run_of(tmp_path / "run", *gpus)
    file = tmp_path / "run" / "accelerate.yaml"
    assert seen_by_ranks("--config_file", str(file)) == named
    assert read_accelerate_config(file) == run.accelerate and run.accelerate.gpu_ids == named


def test_where_all_are_alike_the_users_setting_counts(given, tmp_path):
    run_of(tmp_path / "run", LARGE, TWIN)
    assert seen_by_ranks("--config_file", str(tmp_path / "run" / "accelerate.yaml")) == given


@pytest.mark.parametrize(("here", "is_named"), [((SMALL, LARGE, TWIN), True), ((SMALL, LARGE), False)])
def test_our_launcher_does_the_same_and_eval_takes_what_is_there(here, is_named, given, tmp_path, monkeypatch):
    run, seen = run_of(tmp_path / "run", SMALL, LARGE, TWIN), []

    def started(parsed):
        parsed, *_ = accelerate_launch._validate_launch_command(parsed)
        seen.append(prepare_multi_gpu_env(parsed).get(VISIBLE))

    monkeypatch.setattr(accelerate_launch, "launch_command", started)
    monkeypatch.setattr("fitune.planning.hardware.found_here", lambda: Machine(here, 128, 120))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    assert launch.launch(run, "fitune.training.evaluate") == 0
    assert seen == ["GPU-1111,GPU-2222" if is_named else given]


def test_gpus_by_number_must_be_text(tmp_path):
    """YAML reads 1 as a number, at which accelerate fails with a traceback."""
    file = tmp_path / "mine.yaml"
    text = "distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}\nmixed_precision: bf16\nnum_processes: 1\n"
    file.write_text(text + "gpu_ids: 1\n")
    with pytest.raises(UsageError, match=r'mine.yaml: gpu_ids must be text, not 1; write gpu_ids: "1"$'):
        read_accelerate_config(file)
    for written, read in (('"1"', "1"), ("0,2", "0,2"), ("all", None)):
        file.write_text(text + f"gpu_ids: {written}\n")
        assert read_accelerate_config(file).gpu_ids == read


def test_a_gpu_of_ones_own_config_that_is_hidden_is_refused():
    hidden = Machine((SMALL, LARGE), 128, 120).shown_by("1,2")
    with pytest.raises(UsageError, match=r"^gpu_ids 1,2: GPU 2 is not here, or hidden; there are: 0, 1$"):
        hidden.refuse_missing_gpus()
    assert hidden.gpus == (LARGE,)
    assert Machine((SMALL, LARGE, TWIN), 128, 120).shown_by("GPU-22, GPU-11").gpus == (TWIN, LARGE)
