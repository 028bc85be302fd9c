"""Two machines whose bases differ under one name: each in a mount namespace, so that one path leads to two models."""

import os
import shutil
import subprocess

import pytest
from commands import start_on_two_machines, train_command

CAN_MOUNT = (
    shutil.which("unshare") is not None
    and subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0
)


@pytest.mark.skipif(not CAN_MOUNT, reason="mount namespaces need root")
def test_different_bases_are_refused_before_the_first_step_with_machines_and_values_named(
    tiny_base, prepared, tmp_path
):
    base, other = tmp_path / "base", tmp_path / "other"
    shutil.copytree(tiny_base, base)
    shutil.copytree(tiny_base, other)
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    instead = ("unshare", "--mount", "sh", "-c", f'mount --bind {other} {base} && exec "$@"', "sh")
    folder = tmp_path / "run"
    machines = start_on_two_machines(train_command(base, prepared, folder, 3), tmp_path, instead)
    host = os.uname().nodename
    codes = [machine.wait() for machine in machines]
    said = "".join(machine.log.read_text() for machine in machines)
    assert codes == [2, 2], said[-3000:]
    assert f" on {host} (rank 0) and " in said and f" on {host} (rank 1); copy the same model to all machines" in said
    for machine in machines:
        assert machine.log.read_text().count("error: the machines differ: base.sample is ") == 1, said[-3000:]
    assert not (folder / "metrics.jsonl").exists() and not list(folder.glob("checkpoints/*"))
