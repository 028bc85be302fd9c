"""What only a GPU can prove. Several ranks share one GPU, each held to a part of its memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = os.environ.get("FITUNE_LLAMA3_TOKENIZER")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
    pytest.mark.skipif(not TOKENIZER, reason="FITUNE_LLAMA3_TOKENIZER is not set to a Llama 3 tokenizer's folder"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Two layers of the 8B shape in bitsandbytes' NF4 format."""
    folder = tmp_path_factory.mktemp("base") / "model"
    script = ROOT / "benchmarks" / "random_checkpoint.py"
    options = ["--shape", "8b", "--layers", "2", "--tokenizer", TOKENIZER]
    subprocess.run([sys.executable, script, folder, *options], check=True)
    return folder


@pytest.mark.parametrize("profile", ["fsdp_2x40gb", "fsdp_4x24gb", "fsdp_offload_2x24gb", "fsdp_offload_4gpu"])
def test_every_gathered_byte_equals_the_checkpoint(profile, checkpoint, tmp_path):
    from fitune import run as runs

    sets = (f"base.model={checkpoint}", "global_batch_size=8")
    run = runs.resolve("llama3_70b_qlora", profile, sets, str(tmp_path))
    (tmp_path / "run.yaml").write_text(runs.dump(run))
    ranks = run.accelerate.num_processes
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "29511"]
    environment = os.environ | {"FITUNE_GPU_CAP_GIB": "8", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [*command, ROOT / "tests" / "gpu_bit_exact.py", tmp_path / "run.yaml"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("changed bytes before 0 after 0") == ranks
