"""Two machines in network namespaces of their own: what they train together, and that different bases are refused.

Each has a name, which leads to its loopback as on Debian and Ubuntu, and mounts of its own, so that one path leads to
two models.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Running, losses, start_on_two_machines, train_command

ADDRESSES = ("10.77.5.1", "10.77.5.2")
MACHINE = Path(__file__).with_name("machine.py")


def _ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0


def _can_be_two() -> bool:
    name = f"fitune-try-{os.getpid()}"
    if not (shutil.which("ip") and shutil.which("unshare") and _ip("netns", "add", name)):
        return False
    _ip("netns", "delete", name)
    return subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True, check=False).returncode == 0


@pytest.fixture
def two_machines(tmp_path) -> Iterator:
    """`place(n, model="", path="")`: what comes before a command of machine n, on which `path` leads to `model`."""
    names = [f"fitune-{os.getpid()}-{n}" for n in (0, 1)]
    ends = [f"ft{os.getpid()}-{n}" for n in (0, 1)]
    for name in names:
        assert _ip("netns", "add", name)
    assert _ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
    for name, end, address in zip(names, ends, ADDRESSES, strict=True):
        assert _ip("-n", name, "address", "add", f"{address}/24", "dev", end)
        assert _ip("-n", name, "link", "set", end, "up") and _ip("-n", name, "link", "set", "lo", "up")

    def place(n: int, model="", path="") -> list[str]:
        hosts = tmp_path / f"hosts-{n}"
        others = "".join(f"{address} machine-{i}.lan\n" for i, address in enumerate(ADDRESSES))
        hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 machine-{n}\n{others}")
        return [sys.executable, str(MACHINE), names[n], f"machine-{n}", str(hosts), str(model), str(path)]

    yield place
    for name in names:
        _ip("netns", "delete", name)


needs_root = pytest.mark.skipif(not _can_be_two(), reason="network namespaces need root and iproute2")


@needs_root
def test_different_bases_are_refused_before_the_first_step_with_machines_and_values_named(
    two_machines, tiny_base, prepared, tmp_path
):
    base, other = tmp_path / "base", tmp_path / "other"
    shutil.copytree(tiny_base, base)
    shutil.copytree(tiny_base, other)
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    folder = tmp_path / "run"
    command = [*train_command(base, prepared, folder, 3), "--main-process-ip", ADDRESSES[0]]
    machines = start_on_two_machines(command, tmp_path, (two_machines(0), two_machines(1, other, base)))
    codes = [machine.wait() for machine in machines]
    said = "".join(machine.log.read_text() for machine in machines)
    assert codes == [2, 2], said[-3000:]
    assert " on machine-0 (rank 0) and " in said
    assert " on machine-1 (rank 1); copy the same model to all machines" in said
    for machine in machines:
        assert machine.log.read_text().count("error: the machines differ: base.sample is ") == 1, said[-3000:]
    assert not (folder / "metrics.jsonl").exists() and not list(folder.glob("checkpoints/*"))


@needs_root
def test_machines_whose_names_lead_to_their_loopback_train_together(two_machines, tiny_base, prepared, tmp_path):
    """Gloo by itself would listen there: Debian and Ubuntu write 127.0.1.1 beside a machine's name."""
    command = [*train_command(tiny_base, prepared, tmp_path / "run", 2), "--main-process-ip", ADDRESSES[0]]
    for machine in start_on_two_machines(command, tmp_path, (two_machines(0), two_machines(1))):
        assert machine.wait() == 0, machine.log.read_text()[-3000:]
    assert [step for step, *_ in losses(tmp_path / "run")] == [1, 2]


def test_what_two_machines_trained_they_eval_together(tiny_base, prepared, tmp_path):
    """Without namespaces: the port at which they meet is free again for their ranks."""
    for machine in start_on_two_machines(train_command(tiny_base, prepared, tmp_path / "run", 1), tmp_path):
        assert machine.wait() == 0, machine.log.read_text()[-3000:]
    command = [sys.executable, "cli.py", "eval", str(tmp_path / "run"), "--main-process-ip", "127.0.0.1"]
    machines = [Running([*command, "--machine-rank", str(n)], tmp_path / f"eval-{n}") for n in (1, 0)]
    for machine in machines:
        assert machine.wait() == 0, machine.log.read_text()[-3000:]
    assert set(json.loads((tmp_path / "run/eval.json").read_text())) == {"base", "tuned", "rows"}
