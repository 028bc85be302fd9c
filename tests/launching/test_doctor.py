"""What `doctor` finds of GPUs, disk and shared memory, and `train` notes before it starts."""

from types import SimpleNamespace

from fake_nvidia_smi import card

from fitune.launching import disk_speed, doctor, preflight, shared_memory
from fitune.planning.fill import resolve


def test_doctor_times_the_disk_that_runs_are_saved_on(tmp_path, monkeypatch):
    clock = iter([0.0, 0.1, 0.0, 2.0])
    monkeypatch.setattr(disk_speed, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    fast = doctor._disk_speed(tmp_path)
    assert fast.good and fast.text.startswith("writes 0.67 GB/s here; a checkpoint has 0.5 GB") and not fast.fix
    slow = doctor._disk_speed(tmp_path)
    assert slow.good is None and slow.text.startswith("writes 0.034 GB/s here") and "--output FOLDER" in slow.fix
    assert not list(tmp_path.iterdir())
    missing = doctor._disk_speed(tmp_path / "nowhere")
    assert missing.good is None and missing.text == "nothing can be written here: No such file or directory"


def test_train_notes_a_disk_that_large_checkpoints_take_minutes_on(tmp_path, monkeypatch):
    """Full fine-tuning's are large. An adapter's disk is not timed at all."""
    seconds = []
    monkeypatch.setattr(disk_speed, "time", SimpleNamespace(perf_counter=lambda: seconds.pop(0)))

    def said(recipe: str, profile: str, took: float, *sets: str) -> str | None:
        seconds[:] = [0.0, took]
        return disk_speed.slow_to_save(resolve(recipe, profile, sets, str(tmp_path / "runs/run")))

    assert said("llama3_8b_full", "fsdp_2x80gb", 1.0) == (
        f"{tmp_path} is written at 0.067 GB/s: a checkpoint of 96 GB takes 24 minutes; --output on a faster disk, or a "
        f"larger training.save_steps"
    )
    assert said("llama3_8b_full", "fsdp_2x80gb", 0.05) is None and not seconds
    assert said("llama3_8b_full", "fsdp_2x80gb", 1.0, "training.save_strategy=no") is None and seconds
    assert said("llama3_70b_qlora", "fsdp_4x24gb", 1.0) is None and seconds
    assert not list(tmp_path.iterdir())


def test_too_little_shared_memory_is_seen_by_doctor_and_told_before_ranks_of_one_machine_start(
    nvidia_smi, monkeypatch, capsys
):
    nvidia_smi([card(1), card(2)])
    one, two = resolve("llama3_8b_qlora", "single_gpu"), resolve("llama3_8b_lora", "fsdp_2x40gb")
    for free, is_short in ((64 * 2**20, True), (2**32, False)):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(shared_memory.shutil, "disk_usage", lambda _, usage=usage: usage)
        found = doctor._shared_memory()
        assert bool(found) == is_short
        if found:
            assert found[0].good is False and "64 MiB" in found[0].text and "--shm-size=1g" in found[0].fix
        preflight._check_gpus(one)
        assert capsys.readouterr().err == ""
        preflight._check_gpus(two)
        assert ("note: /dev/shm has 64 MiB free" in capsys.readouterr().err) == is_short


def test_doctor_counts_gpus_that_are_alike(nvidia_smi):
    nvidia_smi([card(1), card(2), card(3, name="NVIDIA L4")])
    text = doctor._gpus()[0].text
    assert text.startswith("2 x NVIDIA ") and text.count(";") == 1 and "; NVIDIA L4, " in text
