"""Reads SkyPilot tasks with SkyPilot's own parser, and looks for the flags with which `submit` hands them over."""

import copy
import subprocess
import sys
from pathlib import Path

import sky
import yaml


def read(config: dict) -> sky.Task:
    return sky.Task.from_yaml_config(copy.deepcopy(config))  # which it takes apart


def check(file: Path) -> None:
    """What SkyPilot understands is what was asked for."""
    config = yaml.safe_load(file.read_text())
    task = read(config)
    [resources] = task.resources
    asked = config["resources"]
    name, _, count = asked.get("accelerators", "").partition(":")
    assert (resources.accelerators or {}) == ({name: int(count)} if name else {}), resources
    assert resources.use_spot and resources.job_recovery["recover_on_exit_codes"] == [75], resources.job_recovery
    assert task.num_nodes == config["num_nodes"] and "HF_TOKEN" in task.secrets
    assert resources.cpus == asked.get("cpus") and resources.memory == asked.get("memory")


def refuses(config: dict) -> bool:
    try:
        read(config)
    except ValueError:
        return True
    return False


def main() -> None:
    files = [Path(name) for name in sys.argv[1:]]
    for file in files:
        check(file)
    good = yaml.safe_load(files[0].read_text())
    assert refuses(good | {"num_node": 2}), "a key that SkyPilot does not know went through"
    wrong = good["resources"] | {"job_recovery": {"recover_on_exit_codes": [750]}}
    assert refuses(good | {"resources": wrong}), "an exit code that none can have went through"
    sky_command = Path(sys.executable).parent / "sky"
    told = subprocess.run([sky_command, "jobs", "launch", "--help"], capture_output=True, text=True, check=True).stdout
    assert "--yes" in told and "--secret " in told, told
    print(f"SkyPilot {sky.__version__} reads {len(files)} tasks")


if __name__ == "__main__":
    main()
