"""A disk that fills up while a checkpoint is saved, or a model merged: a small tmpfs, where one may be mounted."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fitune.errors import FituneError
from fitune.export import merge

sys.path.insert(0, str(Path(__file__).parent))

from commands import Hold, Running, losses, saved_steps, train_command


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 4 MiB; call what comes with it for one of another size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options: str) -> None:
        subprocess.run(["mount", *options, str(folder)], check=True, capture_output=True)

    try:
        mount("-t", "tmpfs", "-o", "size=4m", "tmpfs")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no tmpfs can be mounted here: {error}")
    yield folder, lambda size: mount("-o", f"remount,size={size}")
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_costs_no_checkpoint_and_no_steps(small_disk, tiny_base, prepared, tmp_path, monkeypatch):
    disk, resize = small_disk
    command = train_command(tiny_base, prepared, disk / "run", 40, **{"training.save_total_limit": 40})
    running = Running([*command, "--force"], tmp_path / "log")
    assert running.wait() == 1
    saved = saved_steps(disk / "run")
    text = running.log.read_text()
    assert f"error: step {saved[-1] + 1} was not saved in {disk}/run/checkpoints: " in text
    assert "Traceback" not in text
    assert "No space left on device" in text and f"go on with: python cli.py train --resume {disk}/run" in text

    resize("64m")
    hold = Hold(tmp_path)
    hold.after(saved[-1] + 2)
    resumed = Running([*command, "--force", "--resume"], tmp_path / "log-resumed", **hold.environment)
    resumed.wait_for(lambda: losses(disk / "run")[-1][0] > saved[-1] + 1)
    resumed.process.terminate()
    hold.release()
    assert resumed.wait() == 75
    assert "skipped" not in resumed.log.read_text()
    assert [step for step, *_ in losses(disk / "run")] == list(range(1, saved_steps(disk / "run")[-1] + 1))
    adapter = shutil.copytree(disk / f"run/checkpoints/checkpoint-{saved[-1]}/adapter", tmp_path / "adapter")
    shutil.rmtree(disk / "run")

    resize("256k")  # less than the model takes, as when another program fills the disk after merge looked at it
    monkeypatch.setattr(merge, "check_disk_space", lambda output, nbytes: None)
    (disk / "precious").write_text("1")
    with pytest.raises(FituneError, match=r"merged: not written: .*No space left on device; nothing was left behind"):
        merge.merge_adapter(tiny_base, adapter, disk / "merged", progress=False)
    assert [path.name for path in disk.iterdir()] == ["precious"]
    resize("64m")
    merge.merge_adapter(tiny_base, adapter, disk / "merged", progress=False)
