"""Which GPUs count, how much memory they have, and what is known of them by name."""

from types import SimpleNamespace

import pytest

from fitune.planning import hardware
from fitune.planning.hardware import GPU_MODELS, Gpu, _visible, gpu_model, likely_model, this_machine


@pytest.mark.parametrize(
    ("name", "model"),
    [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA A100-SXM4-80GB", "A100"),
     ("NVIDIA A100-PCIE-40GB", "A100-PCIE"), ("NVIDIA L40S", "L40S"), ("NVIDIA GeForce RTX 4090", "RTX 4090"),
     ("NVIDIA A10G", "A10"), ("NVIDIA RTX A6000", "A6000"), ("h200", "H200")],
)  # fmt: skip
def test_gpu_names_are_recognised(name, model):
    assert gpu_model(name).name == model


def test_an_unknown_gpu_is_taken_for_the_typical_one_of_its_size():
    assert likely_model(24, "Some GPU").name == "RTX 4090"
    assert likely_model(48, "NVIDIA L40").name == "A6000", "an L40 is no L4"
    assert all(model.source for model in GPU_MODELS)


def test_only_visible_gpus_count(monkeypatch):
    gpus = [(f"GPU-{letter * 8}", Gpu(letter, 24, 23)) for letter in "abcd"]
    for value, names in (("0,2", "ac"), ("GPU-bbbb", "b"), ("", ""), (None, "abcd")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if value is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert "".join(gpu.name for gpu in _visible(gpus)) == names


def test_nvidia_smi_counts_in_mib_and_the_fullest_gpu_decides(monkeypatch):
    said = "GPU-a, NVIDIA RTX A6000, 49152, 48128\nGPU-b, NVIDIA RTX A6000, 49152, 24576\n"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(hardware.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(hardware.subprocess, "run", lambda *_, **options: SimpleNamespace(stdout=said))
    machine = this_machine()
    assert [(gpu.total_gib, gpu.free_gib) for gpu in machine.gpus] == [(48, 47), (48, 24)]
    assert machine.gpu_memory_gib == 24
    assert machine.known_model.name == "A6000"
