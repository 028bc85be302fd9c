"""The table of GPUs: which name means which, what an entry must have, and what a GPU is taken for that it lacks."""

import json
import math

import pytest
from click.testing import CliRunner

from fitune.cli import cli
from fitune.errors import UsageError
from fitune.planning.gpu_models import GPU_MODELS, gpu_model, likely_model, look_up, memory_of
from fitune.planning.machine import Gpu


def test_stated_products_time_an_unknown_gpu():
    def seconds(*flags: str) -> float:
        result = CliRunner().invoke(cli, ["plan", "llama3_8b_qlora", "--gpus", "1", *flags, "--json"])
        return json.loads(result.output)["estimate"]["step_seconds"]

    slow, fast = (seconds("--gpu-memory", "24", "--gpu-tflops", rate) for rate in ("50", "100"))
    assert 1.5 < slow / fast <= 2
    named = CliRunner().invoke(
        cli, ["plan", "llama3_8b_qlora", "--gpu", "Foo 1", "--gpu-memory", "24", "--gpu-tflops", "50"]
    )
    assert named.exit_code == 0 and "tokens/s on Foo 1;" in named.output


def test_a_name_alone_knows_its_memory():
    result = CliRunner().invoke(cli, ["plan", "llama3_8b_qlora", "--gpu", "RTX 4090", "--json"])
    answer = json.loads(result.output)
    assert answer["gpus"] == 1 and answer["estimate"]["gpu"] == "RTX 4090"
    assert {v["has"] for v in answer["verdicts"] if v["resource"] == "GPU memory"} == {24.0}
    assert memory_of("A100 80GB") == 80 and memory_of("NVIDIA A100-SXM4-40GB") == 40 and memory_of("h100") == 79.6
    with pytest.raises(UsageError, match="A100 is sold with 40 or 80 GiB: add --gpu-memory"):
        memory_of("A100")
    refused = CliRunner().invoke(cli, ["plan", "llama3_8b_qlora", "--gpu", "RTX 2080 Ti"])
    assert refused.exit_code == 2 and "no bf16" in refused.stderr


@pytest.mark.parametrize(
    ("name", "model"),
    [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA A100-SXM4-80GB", "A100"),
     ("NVIDIA A100-PCIE-40GB", "A100-PCIE"), ("NVIDIA L40S", "L40S"), ("NVIDIA GeForce RTX 4090", "RTX 4090"),
     ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"), ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"), ("rtx4090", "RTX 4090"),
     ("NVIDIA A800 80GB PCIe", "A800 80GB PCIe"), ("NVIDIA A800-SXM4-80GB", "A800"), ("NVIDIA H800 PCIe", "H800 PCIe"),
     ("NVIDIA L20", "L20"), ("NVIDIA RTX A4000 Laptop GPU", "A4000 Laptop"),
     ("NVIDIA RTX 5000 Ada Generation Laptop GPU", "RTX 5000 Ada Generation Laptop"), ("NVIDIA RTX A4000", "A4000"),
     ("NVIDIA RTX 5000 Ada Generation", "RTX 5000 Ada"),
     ("NVIDIA A10G", "A10"), ("NVIDIA RTX A6000", "A6000"), ("h200", "H200"), ("NVIDIA L4", "L4"),
     ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090 Laptop"),
     ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti SUPER"),
     ("NVIDIA GeForce RTX 3080 Ti", "RTX 3080 Ti"), ("NVIDIA GeForce RTX 4090 D", "RTX 4090 D"),
     ("NVIDIA GeForce RTX 5090", "RTX 5090"), ("RTX-5090-D", "RTX 5090 D"),
     ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti"),
     ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
     ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000"), ("NVIDIA GB200", "GB200"),
     ("NVIDIA B200", "B200"), ("NVIDIA B300", "B300"), ("NVIDIA GH200 480GB", "GH200"), ("NVIDIA GB10", "GB10"),
     ("NVIDIA H100 NVL", "H100 NVL"), ("NVIDIA A40", "A40"), ("NVIDIA L40", "L40"), ("Tesla T4", "T4")],
)  # fmt: skip
def test_gpu_names_are_recognised(name, model):
    assert gpu_model(name).name == model


@pytest.mark.parametrize(
    ("on_the_bus", "linked"),
    [
        ("NVIDIA A100 80GB PCIe", "NVIDIA A100-SXM4-80GB"),
        ("NVIDIA A100-PCIE-40GB", "NVIDIA A100-SXM4-40GB"),
        ("NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3"),
    ],
)
def test_cards_on_the_bus_are_not_taken_for_those_with_nvlink(on_the_bus, linked):
    """Weights that are gathered take ten times as long there."""
    assert gpu_model(linked).has_nvlink and not gpu_model(on_the_bus).has_nvlink


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA RTX A2000 Laptop GPU",
        "NVIDIA GeForce GTX 1650",
        "NVIDIA RTX 9999",
        "NVIDIA GeForce RTX 5080 SUPER",
        "NVIDIA GeForce RTX 5060 Ti Laptop GPU",
        "NVIDIA GeForce RTX 4080 D",
        "NVIDIA RTX PRO 6000D",
    ],
)
def test_a_gpu_is_never_taken_for_another(name):
    assert look_up(name) is None


def test_the_table_states_its_sources_and_finds_each_entry_by_its_own_name():
    for model in GPU_MODELS:
        assert gpu_model(model.name) is model, model.name
        assert model.source and model.memory_gib and model.memory_gb_s > 0 and model.host_link_gb_s >= 16
        assert (model.bf16_tflops > 0) == model.has_bf16 and math.isfinite(model.peer_link_gb_s)


def test_an_unknown_gpu_has_a_typical_ones_rates_to_choose_by():
    unknown = likely_model(24, "Some GPU")
    assert unknown.name == "Some GPU" and not unknown.is_known
    assert unknown.bf16_tflops == gpu_model("RTX 4090").bf16_tflops
    assert likely_model(24).name == "RTX 4090" and likely_model(24).is_known
    assert Gpu("Some GPU", 24, 24).known_model is None
