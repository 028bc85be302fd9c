"""`cli.py plan` as it is typed: what it prints first, its JSON, bad input, and that it needs nothing heavy."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from fitune.planning.machine import Gpu, Machine

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "huggingface_hub")


@pytest.fixture
def cli(monkeypatch):
    from fitune.cli import cli as group

    return lambda *arguments: CliRunner().invoke(group, ["plan", *map(str, arguments)])


def test_the_verdict_comes_first_and_details_when_asked(cli):
    flags = ("llama3_70b_qlora", "--profile", "fsdp_4x24gb", "--price-per-hour", "2")
    result = cli(*flags)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[:2] == [
        "llama3_70b_qlora on fsdp_4x24gb fits", "GPU memory  fits: needs 20.5 GiB of 22.5, 2.0 to spare",
    ]  # fmt: skip
    assert all(len(line.rstrip()) <= 90 for line in lines) and "quantisation statistics" in result.output
    assert "optimizer step" not in result.output and "GB to train" not in result.output
    detailed = cli(*flags, "--details").output.splitlines()
    assert lines[:-1] == detailed[: len(lines) - 1]
    assert "optimizer step" in "\n".join(detailed) and "GB to train" in "\n".join(detailed)
    assert detailed[-2].startswith("a step  compute ")


def test_a_price_always_has_a_cost_per_million_tokens(cli):
    flags = ("llama3_70b_qlora", "--profile", "fsdp_4x24gb", "--price-per-hour", "2")
    unknown = next(line for line in cli(*flags).output.splitlines() if line.startswith("cost"))
    assert unknown.endswith(" per million tokens at 2 an hour; total known after `prepare`")
    known = next(
        line for line in cli(*flags, "--set", "training.max_steps=100").output.splitlines() if line.startswith("cost")
    )
    estimate = json.loads(cli(*flags, "--set", "training.max_steps=100", "--json").output)["estimate"]
    per_million = estimate["cost_per_million_tokens"]
    tokens = 100 * estimate["step_seconds"] * estimate["tokens_per_second"] / 1e6
    assert estimate["cost"] == pytest.approx(per_million * tokens, rel=1e-3)
    assert known == f"cost        {per_million:,.2f} per million tokens at 2 an hour; {estimate['cost']:,.2f} in total"


def test_the_table_of_all_profiles_is_rounded_and_explained(cli):
    lines = cli("llama3_8b_qlora", "--all").output.splitlines()
    row = next(line for line in lines if line.startswith("single_gpu_8gb"))
    assert row.split("  ")[0] == "single_gpu_8gb" and "7.5 + 4.9" in row and "16! + 5.2" in row
    assert all(len(line.rstrip()) <= 80 for line in lines) and any(line.startswith("38! + 9") for line in lines)


def test_json_has_the_exact_numbers(cli):
    result = cli("llama3_70b_qlora", "--profile", "fsdp_4x24gb", "--json")
    data = json.loads(result.output)
    keys = {"fits", "peak_gpu_gib", "peak_allocated_gib", "peak_host_gib", "disk_gib", "micro_batch", "max_length",
            "components", "phases"}  # fmt: skip
    assert keys <= set(data) and data["fits"] is True
    assert sum(data["components"].values()) == pytest.approx(data["peak_gpu_gib"], abs=0.01)
    assert data["phases"][data["peak_phase"]] == data["peak_allocated_gib"]


def test_all_and_given_hardware(cli):
    assert "fsdp_offload_1x12gb" in cli("llama3_70b_qlora", "--all").output
    given = cli("llama3_70b_qlora", "--gpus", "4", "--gpu-memory", "24", "--json")
    assert json.loads(given.output)["profile"] == "4x24gb"
    found = cli("llama3_70b_qlora", "--gpus", "4", "--gpu-memory", "24", "--find", "--json")
    assert json.loads(found.output)["profile"] == "4x24gb" and json.loads(found.output)["gpus_idle"] == 0


def test_time_is_that_of_the_gpus_there_are(cli, monkeypatch):
    def gpu_of(*flags: str) -> str:
        return json.loads(cli("llama3_8b_qlora", *flags, "--json").output)["estimate"]["gpu"]

    assert gpu_of("--gpus", "1", "--gpu-memory", "80", "--find") == "H100"  # found: fsdp_1x48gb
    here = Machine((Gpu("NVIDIA GeForce RTX 3090", 24, 23.5),), 64, 60)
    monkeypatch.setattr("fitune.planning.hardware.found_here", lambda: here)
    assert gpu_of() == "RTX 3090" and gpu_of("--gpu", "RTX 4090") == "RTX 4090"


BAD = {
    "unknown model": (["--profile", "fsdp_4x24gb", "--set", "base.model=foo/bar"], "hf download foo/bar config.json"),
    "missing folder": (["--profile", "fsdp_4x24gb", "--set", "base.model=./nowhere"], "no such folder"),
    "zero GPUs": (["--gpus", "0", "--gpu-memory", "24"], "--gpus must be 1 or more"),
    "states of another method": (
        ["--gpu", "H100", "--set", "profile.optimizer_state=bf16_8bit"],
        "bf16_8bit is for method full",
    ),
    "a smaller card": (
        ["--profile", "fsdp_1x48gb", "--gpu", "RTX 3060"],
        "--gpu RTX 3060 has 12 GiB, profile fsdp_1x48gb states 48",
    ),
    "price of all": (["--all", "--price-per-hour", "3"], "its own hardware: leave out --price-per-hour"),
    "details of all": (["--all", "--details", "--gpu", "H100"], "its own hardware: leave out --details, --gpu"),
    "fp8 that a card lacks, before a search": (
        ["--gpu", "RTX A6000", "--host-memory", "8", "--set", "profile.compute=fp8"],
        "A6000 has 8.6; use --set profile",
    ),
    "too many GPUs": (
        ["--gpus", "129", "--gpu", "H100"],
        "one machine, at most 128, not 129; for more give --machines",
    ),
    "no GPU memory": (["--gpus", "1"], "--gpu-memory"),
    "endless batch": (["--profile", "fsdp_4x24gb", "--set", "global_batch_size=1000001"], "or equal to 1000000"),
    "no finite number": (
        ["--profile", "fsdp_4x24gb", "--set", "lora.alpha=.inf"],
        "lora.alpha: Input should be a finite",
    ),
    "schedule": (
        ["--profile", "fsdp_4x24gb", "--set", "training.lr_scheduler_type=x"],
        "linear, polynomial, reduce_lr",
    ),
    "GPU memory alone": (["--gpu-memory", "24"], "--gpus N"),
    "profile of another method": (["--profile", "fsdp_full_16x80gb"], "is for full"),
    "too long": (["--profile", "fsdp_4x24gb", "--set", "max_length=9000"], "beyond the 8192 positions"),
    "profile and hardware": (["--profile", "fsdp_4x24gb", "--gpus", "2"], "leave out"),
    "all and find": (["--all", "--find"], "leave out"),
    "unknown GPU": (["--profile", "fsdp_4x24gb", "--gpu", "GTX 1"], "not in the table"),
    "several models": (["--gpu", "RTX 4090,RTX 3090"], "--gpu takes one model, given is 'RTX 4090,RTX 3090'"),
    "count in the model": (["--gpu", "2x RTX 4090"], "use --gpu 'RTX 4090' --gpus 2"),
    "count behind the model": (["--gpu", "RTX 4090 x4"], "use --gpu 'RTX 4090' --gpus 4"),
    "unknown linear": (["--profile", "fsdp_4x24gb", "--set", "lora.target_modules=[q_prj]"], "did you mean 'q_proj'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case, cli):
    arguments, text = BAD[case]
    result = cli("llama3_70b_qlora", *arguments)
    assert result.exit_code == 2
    message = result.stderr.strip()
    assert text in message and message.count("\n") == 0 and message.startswith("error: ")


@pytest.mark.parametrize("arguments", [["--profile", "fsdp_4x24gb"], ["--all"]], ids=["profile", "all"])
def test_answers_without_heavy_imports(arguments):
    code = "import sys, runpy; sys.argv[0] = 'cli.py'\n"
    code += "try: runpy.run_path('cli.py', run_name='__main__')\nexcept SystemExit: pass\n"
    code += f"print('HEAVY', [m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, "plan", "llama3_70b_qlora", *arguments],
                          cwd=ROOT, capture_output=True, text=True, check=True)  # fmt: skip
    assert "HEAVY []" in done.stdout


def test_a_picture_of_host_ram_begins_with_the_largest_and_leaves_out_what_rounds_to_nothing(cli, tiny_base):
    result = cli("tiny_qlora", "--profile", "cpu_2proc", "--set", f"base.model={tiny_base}")
    assert result.exit_code == 0, result.output
    table = result.output.partition("host RAM at its peak")[2].splitlines()[2:]
    *parts, total = [float(re.search(r" (\d+\.\d\d)", line)[1]) for line in table[: _first_total(table) + 1]]
    assert parts == sorted(parts, reverse=True) and min(parts) > 0 and total == pytest.approx(sum(parts), abs=0.03)


def _first_total(lines: list[str]) -> int:
    return next(place for place, line in enumerate(lines) if line.startswith("all, of "))


def test_where_only_more_ram_would_do_it_is_said(cli):
    said = cli("llama3_70b_qlora", "--profile", "single_gpu").output
    assert "nor does another profile; with more RAM than 32 GiB --profile fsdp_offload_1x24gb would" in said
    of_the_profile = ("llama3_70b_qlora", "--profile", "fsdp_offload_1x24gb", "--set")
    for gib, fits in ((42, False), (43, True)):
        said = cli(*of_the_profile, f"profile.host_memory_gib={gib}").output
        assert ("fsdp_offload_1x24gb fits" in said) == fits
        assert ("nor does another profile; 43 GiB of free RAM would do" in said) != fits
    more = ("--set", "profile.host_memory_gib=64")
    assert " fits\n" in cli("llama3_70b_qlora", "--profile", "fsdp_offload_1x24gb", *more).output
