"""What `fitune doctor` checks: versions, GPUs, memory, disk, login and access; each finding says what to do.

It stands in launching/ with the other checks that come before a start.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import click

from fitune.columns import beside
from fitune.config.command_name import command
from fitune.config.host_limits import host_memory_gib, usable_cores
from fitune.config.run import load_recipe
from fitune.config.shipped import how_to_install, pinned_versions
from fitune.environment import GPU_CAP, number
from fitune.errors import FituneError
from fitune.launching.disk_speed import written_gb_s
from fitune.launching.shared_memory import short_of_shared_memory

GATED_RECIPE = "llama3_8b_qlora"
GB = 10**9
SLOW_GB_S = 0.1
CHECKPOINT_GB = "0.5 GB for 8B lora and qlora, 2.5 GB for 70B; for 8B full 96 GB, with small optimizer states 32 GB"


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
        *_gpus(),
        *_gpu_cap(),
        *_fp8(),
        _host_memory(),
        _disk(),
        _disk_speed(),
        _login(),
        _base_model(model),
        *_fastest(),
    ]
    marks = {True: click.style("ok  ", fg="green"), False: click.style("bad ", fg="red"), None: "--  "}
    for finding in findings:
        line = beside(f"     {finding.name:14} ", finding.text).removeprefix("     ")
        click.echo(f"{marks[finding.good]} {line}")
        if finding.fix:
            click.echo(beside(f"{'':20}-> ", finding.fix))
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


def _gpus() -> list[Finding]:
    """What a run can use of them; what is wrong with each."""
    from fitune.planning.hardware import this_machine

    if not shutil.which("nvidia-smi"):
        ask = f'ask about a machine with one: {command()} plan llama3_8b_qlora --gpu "RTX 4090"'
        return [Finding("GPUs", None, "none found; the tiny recipes train on the CPU (profile cpu_2proc)", ask)]
    machine = this_machine()
    if machine.missing:
        return [Finding("GPUs", False, *_in_two(machine.missing))]
    if not machine.gpus:
        hidden = "CUDA_VISIBLE_DEVICES" in os.environ
        text = "CUDA_VISIBLE_DEVICES hides all" if hidden else "nvidia-smi fails or shows none"
        return [Finding("GPUs", False, text, "unset CUDA_VISIBLE_DEVICES" if hidden else "check the NVIDIA driver")]
    kinds = Counter(map(_described, machine.gpus))
    words = "; ".join(f"{count} x {kind}" if count > 1 else kind for kind, count in kinds.items())
    found = [Finding("GPUs", True, words)]
    try:
        machine.refuse_missing_bf16()
    except FituneError as error:
        lacks, to_do = _in_two(str(error))
        able = machine.with_bf16.gpus
        found.append(Finding("bf16", None, f"{lacks}: it stays idle") if able else Finding("bf16", False, lacks, to_do))
    if machine.with_bf16.uneven:
        found.append(
            Finding("uneven GPUs", None, f"{machine.with_bf16.uneven}; train leaves out those that slow a run down")
        )
    if len(machine.gpus) > 1:
        found += _shared_memory()
    return found


def _in_two(error: str) -> list[str]:
    """What is wrong, and what to do."""
    return error.rsplit("; ", 1)


def _described(gpu) -> str:
    if gpu.unified:
        return f"{gpu.name}, shares the machine's RAM"
    link = f", {gpu.link_gb_s:g} GB/s to the host" if gpu.link_gb_s else ""
    return f"{gpu.name}, {gpu.total_gib:.1f} GiB ({gpu.free_gib:.1f} free){link}"


def _gpu_cap() -> list[Finding]:
    """What looks like small GPUs may be large ones that are held to a part of their memory."""
    if (cap := number(GPU_CAP)) is None:
        return []
    held = f"{GPU_CAP}={cap:g}: each GPU counts as a small card, of which torch takes {cap:g} GiB"
    return [Finding("GPU cap", None, held, f"unset {GPU_CAP} to use all of its memory")]


def _shared_memory() -> list[Finding]:
    short = short_of_shared_memory()
    return [Finding("shared memory", False, *short)] if short else []


def _fp8() -> list[Finding]:
    """Whether the GPUs multiply fp8, where the table of GPUs knows them."""
    from fitune.planning.compute import FP8_CAPABILITY, has_fp8
    from fitune.planning.hardware import this_machine

    models = {gpu.known_model.name: gpu.known_model for gpu in this_machine().with_bf16.gpus if gpu.known_model}
    have = [name for name, model in models.items() if has_fp8(model)]
    lack = [f"{name} has none (compute capability {model.capability:.1f}, fp8 needs {FP8_CAPABILITY})"
            for name, model in models.items() if name not in have]  # fmt: skip
    if have:
        rest = f"; {'; '.join(lack)}" if lack else ""
        can = f"{' and '.join(have)} {'has' if len(have) == 1 else 'have'} it"
        return [Finding("fp8", True, f"{can}: --set profile.compute=fp8 (see docs/fp8.md){rest}")]
    return [Finding("fp8", None, f"{'; '.join(lack)}: profile.compute stays bf16")] if lack else []


def _host_memory() -> Finding:
    total, free = host_memory_gib()
    return Finding("host RAM", True, f"{total:.1f} GiB, {free:.1f} available, {usable_cores()} cores")


def _disk() -> Finding:
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    free_here, free_cache = shutil.disk_usage(Path.cwd()).free / GB, shutil.disk_usage(_existing(cache)).free / GB
    good = free_cache > 20
    fix = "" if good else "8B needs 16 GB, 70B 141 GB (40 GB quantised); set HF_HOME to a larger disk"
    return Finding(
        "disk", good, f"{free_here:.0f} GB free here, {free_cache:.0f} GB free for downloads in {cache}", fix
    )


def _disk_speed(folder: Path | None = None) -> Finding:
    """How fast runs in the working folder can be saved."""
    try:
        speed = written_gb_s(folder or Path.cwd())
    except OSError as error:
        return Finding("disk speed", None, f"nothing can be written here: {error.strerror}", "use --output FOLDER")
    text = f"writes {speed:.2g} GB/s here; a checkpoint has {CHECKPOINT_GB}"
    slow = speed < SLOW_GB_S
    return Finding("disk speed", None if slow else True, text, "keep runs on a faster disk: --output FOLDER" * slow)


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


def _fastest() -> list[Finding]:
    """What `train` would choose for 8B and for 70B on this machine."""
    from fitune.planning.found import why_left_out
    from fitune.planning.hardware import this_machine
    from fitune.planning.search import find

    machine, findings = this_machine(), []
    if not machine.with_bf16.gpus:
        return []  # which has been said
    for recipe in ("llama3_8b_qlora", "llama3_70b_qlora"):
        try:
            fastest = find(recipe, (), machine)
            lines = [fastest.in_one_line(), *why_left_out(fastest)]
            found = Finding("fastest", True, f"{recipe}: {'; '.join(lines)}")
        except FituneError as error:
            found = Finding("fastest", None, str(error))
        findings.append(found)
    return findings
