"""`make submit-test`: job files of `fitune submit` are read by those whose they are.

SkyPilot's own parser reads tasks; JobSets go through the models that are generated from JobSet's and Kubernetes'
OpenAPI. Each reader must also refuse what is wrong with a file, or it says nothing. Nothing is sent anywhere.

    python tests/submit/run.py PYTHON      PYTHON has tests/submit/requirements.txt
"""

import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SKYPILOT = ["--on", "skypilot", "--bucket", "s3://mine"]
KUBERNETES = ["--on", "kubernetes", "--image", "example.org/me/fitune:1"]
IMAGE = ["--image", "example.org/me/fitune:1"]
MANY = ["--cpus", "32", "--memory", "200", "--setup", "pip install uv && uv pip install ."]
GPUS = ["H100", "RTX 4090", "RTX 6000 Ada", "A100-80GB"]
"As a user types them."


def variants() -> dict[str, list[str]]:
    """Flags of `submit` by the name of the job: each scheduler's, with and without what may be left out."""
    found = {}
    for nodes, gpu in product(["1", "2"], GPUS):
        found[f"sky {nodes} {gpu}"] = [*SKYPILOT, "--gpus", "8", "--nodes", nodes, "--gpu", gpu]
    found["sky full"] = [*SKYPILOT, "--gpus", "1", "--gpu", "L40S", *IMAGE, *MANY]
    found["sky profile"] = [*SKYPILOT, "--profile", "fsdp_4x24gb", "--gpu", "RTX 4090"]
    found["sky cpu"] = [*SKYPILOT, "--profile", "cpu_2proc"]
    for nodes in ("1", "2"):
        found[f"k8s {nodes}"] = [*KUBERNETES, "--gpus", "8", "--nodes", nodes]
    found["k8s full"] = [*KUBERNETES, "--gpus", "1", "--hours", "1.5", *MANY]
    found["k8s profile"] = [*KUBERNETES, "--profile", "fsdp_4x24gb"]
    found["k8s cpu"] = [*KUBERNETES, "--profile", "cpu_2proc"]
    return found


def write(folder: Path) -> list[Path]:
    for name, flags in variants().items():
        words = ["submit", "llama3_8b_qlora", *flags, "--output", str(folder / name), "--dry-run"]
        done = subprocess.run(
            [sys.executable, "cli.py", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )  # fmt: skip
        assert done.returncode == 0, f"{name}: {done.stderr}"
    return sorted(folder.glob("*.yaml"))


def main() -> None:
    reader = Path(sys.argv[1]).absolute()
    with tempfile.TemporaryDirectory(prefix="fitune-submit-") as name:
        folder = Path(name)
        files = write(folder)
        environment = os.environ | {"HOME": name, "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
        for script, ending in (("read_tasks.py", ".sky.yaml"), ("read_jobsets.py", ".jobset.yaml")):
            own = [str(file) for file in files if file.name.endswith(ending)]
            assert own, f"no *{ending} was written"
            subprocess.run([reader, HERE / script, *own], env=environment, check=True)
    print(f"{len(files)} job files were read")


if __name__ == "__main__":
    main()
