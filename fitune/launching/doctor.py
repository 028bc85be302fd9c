"""What `fitune doctor` checks: versions, GPUs, memory, disk, login and access; each finding says what to do.

It stands in launching/ with the other checks that come before a start.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click

from fitune.config.run import load_recipe
from fitune.config.shipped import how_to_install, pinned_versions
from fitune.errors import FituneError

GATED_RECIPE = "llama3_8b_qlora"
GB = 10**9


@dataclass
class Finding:
    """One line of the report; `fix` is what to type where something is wrong."""

    name: str
    good: bool | None
    "None: nothing to complain about, but nothing found either."
    text: str
    fix: str = ""


def doctor(model: str | None) -> bool:
    """Prints all findings; False if training cannot work here at all."""
    findings = [
        _python(),
        *_packages(),
        _torch(),
        _gpus(),
        *_fp8(),
        _host_memory(),
        _disk(),
        _login(),
        _base_model(model),
        *_profiles(),
    ]
    marks = {True: click.style("ok  ", fg="green"), False: click.style("bad ", fg="red"), None: "--  "}
    for finding in findings:
        click.echo(f"{marks[finding.good]} {finding.name:14} {finding.text}")
        if finding.fix:
            click.echo(f"{'':20}-> {finding.fix}")
    return all(finding.good is not False for finding in findings)


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    return Finding("python", good, version, "" if good else "install Python 3.11 or newer, then fitune again")


def _packages() -> list[Finding]:
    """Installed versions against the pinned ones."""
    pins, wrong = pinned_versions(), {}
    for name, wanted in pins.items():
        try:
            found = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if found != wanted:
            wrong[name] = f"{name} {found} (want {wanted})"
    text = ", ".join(wrong.values()) or f"all {len(pins)} have the pinned versions"
    return [Finding("packages", not wrong, text, f"run: {how_to_install(*wrong)}" if wrong else "")]


def _torch() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("torch", False, "missing", f"run: {how_to_install('torch')}")
    import torch

    cuda = torch.version.cuda
    if not cuda and shutil.which("nvidia-smi"):
        fix = "pip install --force-reinstall torch==" + torch.__version__.split("+")[0]
        return Finding("torch", False, f"{torch.__version__}: built without CUDA, but there is an NVIDIA GPU", fix)
    return Finding("torch", True, f"{torch.__version__}{f', CUDA {cuda}' if cuda else ', CPU only'}")


def _gpus() -> Finding:
    if not shutil.which("nvidia-smi"):
        return Finding("GPUs", None, "none found; the tiny recipes train on the CPU (profile cpu_2proc)")
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    if done.returncode:
        return Finding("GPUs", False, "nvidia-smi fails: " + done.stdout.strip()[:100], "check the NVIDIA driver")
    rows = [line.split(", ") for line in done.stdout.strip().splitlines()]
    return Finding(
        "GPUs",
        True,
        "; ".join(f"{name}, {int(total) / 1024:.1f} GiB ({int(free) / 1024:.1f} free)" for name, total, free in rows),
    )


def _fp8() -> list[Finding]:
    """Whether the first GPU multiplies fp8, where the table of GPUs knows it."""
    from fitune.planning.compute import FP8_CAPABILITY, has_fp8
    from fitune.planning.hardware import this_machine

    gpu = this_machine().known_model
    if gpu is None:
        return []
    if has_fp8(gpu):
        return [Finding("fp8", True, f"{gpu.name} has it: --set profile.compute=fp8 (see docs/fp8.md)")]
    capability = f"compute capability {gpu.capability:.1f}, fp8 needs {FP8_CAPABILITY}"
    return [Finding("fp8", None, f"{gpu.name} has none ({capability}): profile.compute stays bf16")]


def _host_memory() -> Finding:
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
    total, free = kib["MemTotal"] / 2**20, kib["MemAvailable"] / 2**20
    return Finding("host RAM", True, f"{total:.1f} GiB, {free:.1f} available, {len(os.sched_getaffinity(0))} cores")


def _disk() -> Finding:
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    free_here, free_cache = shutil.disk_usage(Path.cwd()).free / GB, shutil.disk_usage(_existing(cache)).free / GB
    good = free_cache > 20
    fix = "" if good else "8B needs 16 GB, 70B 141 GB (40 GB quantised); set HF_HOME to a larger disk"
    return Finding(
        "disk", good, f"{free_here:.0f} GB free here, {free_cache:.0f} GB free for downloads in {cache}", fix
    )


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _login() -> Finding:
    from huggingface_hub import get_token

    if get_token():
        return Finding("login", True, "a Hugging Face token is there")
    return Finding("login", None, "no Hugging Face token; Llama 3 is gated", "run: hf auth login")


def _base_model(model: str | None) -> Finding:
    """Access to a gated base: fetching its config.json needs the licence to be accepted."""
    from fitune.config.hub import local_config

    model = model or load_recipe(GATED_RECIPE).base.model
    try:
        local_config(model)
    except FituneError as error:
        return Finding("base model", None, str(error))
    return Finding("base model", True, f"{model} can be read")


def _profiles() -> list[Finding]:
    """The fastest profile for 8B and for 70B that fits this machine's GPUs and RAM."""
    from fitune.planning.hardware import this_machine
    from fitune.planning.search import find_profile, profile_as_typed

    findings = []
    for recipe in ("llama3_8b_qlora", "llama3_70b_qlora"):
        try:
            run = find_profile(recipe, (), this_machine()).run
            found = Finding("best profile", True, f"{recipe}: --profile {profile_as_typed(run)}")
        except FituneError as error:
            found = Finding("best profile", None, f"{recipe}: {error}")
        findings.append(found)
    return findings
