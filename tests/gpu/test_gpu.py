"""What only a GPU can prove. Several ranks share one GPU, each held to a part of its memory."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = os.environ.get("FITUNE_LLAMA3_TOKENIZER")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
    pytest.mark.skipif(not TOKENIZER, reason="FITUNE_LLAMA3_TOKENIZER is not set to a Llama 3 tokenizer's folder"),
]

needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="this GPU has no fp8"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Two layers of the 8B shape in bitsandbytes' NF4 format."""
    return random_checkpoint(tmp_path_factory.mktemp("base") / "nf4")


@pytest.fixture(scope="module")
def bf16_checkpoint(tmp_path_factory) -> Path:
    """The same in bf16."""
    return random_checkpoint(tmp_path_factory.mktemp("base") / "bf16", "--format", "bf16")


def random_checkpoint(folder: Path, *options: str) -> Path:
    script = ROOT / "benchmarks" / "random_checkpoint.py"
    shape = ["--shape", "8b", "--layers", "2", "--tokenizer", TOKENIZER]
    subprocess.run([sys.executable, script, folder, *shape, *options], check=True)
    return folder


@pytest.mark.parametrize(
    "profile", ["fsdp_2x40gb", "fsdp_4x24gb", "fsdp_offload_1x24gb", "fsdp_offload_2x24gb", "fsdp_offload_4gpu"]
)
def test_every_gathered_byte_equals_the_checkpoint(profile, checkpoint, tmp_path):
    assert_bit_exact(profile, checkpoint, tmp_path)


@pytest.mark.parametrize("profile", ["single_gpu", "fsdp_offload_2x24gb"])
def test_weights_quantised_while_loading_equal_bitsandbytes_own(profile, tmp_path):
    assert_bit_exact(profile, random_checkpoint(tmp_path / "bf16", "--format", "bf16"), tmp_path)


@pytest.mark.parametrize("profile", ["fsdp_4x24gb", "fsdp_offload_4gpu"])
@pytest.mark.parametrize("base", ["nf4", "bf16"])
def test_hybrid_sharding_gathers_every_byte(profile, base, checkpoint, tmp_path):
    """Two machines of two ranks, all on this one: NCCL gathers inside each, and adds gradients up between them."""
    if base == "bf16":
        checkpoint = random_checkpoint(tmp_path / "bf16", "--format", "bf16")
    assert_bit_exact(profile, checkpoint, tmp_path, machines=2)


@needs_fp8
@pytest.mark.parametrize("profile", ["fsdp_1x48gb", "fsdp_2x40gb", "fsdp_4x24gb", "fsdp_offload_4gpu"])
def test_weights_kept_in_fp8_are_gathered_byte_for_byte(profile, bf16_checkpoint, tmp_path):
    assert_bit_exact(profile, bf16_checkpoint, tmp_path, recipe="llama3_8b_lora", sets=("profile.compute=fp8",))


@needs_fp8
def test_so_they_are_with_hybrid_sharding(bf16_checkpoint, tmp_path):
    options = {"recipe": "llama3_8b_lora", "sets": ("profile.compute=fp8",), "machines": 2}
    assert_bit_exact("fsdp_4x24gb", bf16_checkpoint, tmp_path, **options)


@pytest.mark.parametrize("machines", [1, 2, 4])
def test_whole_copies_hold_every_byte(machines, checkpoint, tmp_path):
    assert_bit_exact("fsdp_4x24gb", checkpoint, tmp_path, machines=machines, replicas=4)


def assert_bit_exact(
    profile: str, checkpoint: Path, tmp_path: Path, machines: int = 1, recipe: str = "llama3_70b_qlora", sets=(),
    replicas: int | None = None,
) -> None:  # fmt: skip
    """`replicas`: copies of the model; None: one for each machine."""
    from fitune.config import run as runs
    from fitune.planning.fill import resolve

    sets = (f"base.model={checkpoint}", "global_batch_size=8", *sets)
    run = resolve(recipe, profile, sets, str(tmp_path))
    hybrid = run.profile.model_copy(update={"replicas": replicas or machines})
    several = run.accelerate.model_copy(update={"num_machines": machines})
    run = run.model_copy(update={"profile": hybrid, "accelerate": several})
    (tmp_path / "run.yaml").write_text(runs.dump(run))
    ranks = run.accelerate.num_processes
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"FITUNE_GPU_CAP_GIB": "8", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [*command, ROOT / "tests" / "gpu" / "gpu_bit_exact.py", tmp_path / "run.yaml"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("changed bytes before 0 after 0") == ranks


SMALL_STATES = "profile.optimizer_state=bf16_8bit"
TRAINED_TOKENS = "lora.trainable_tokens=['<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>']"


@pytest.mark.parametrize(
    ("recipe", "profile", "extra"),
    [
        pytest.param("tiny_qlora", "single_gpu", [], id="qlora"),
        pytest.param("tiny_qlora", "fsdp_2x40gb", ["profile.replicas=2"], id="qlora-a-whole-copy-on-each-of-two-ranks"),
        pytest.param("tiny_lora", "fsdp_1x48gb", [], id="lora"),
        pytest.param("tiny_lora", "fsdp_1x48gb", ["profile.compute=fp8"], id="lora-in-fp8", marks=needs_fp8),
        pytest.param("tiny_qlora", "fsdp_1x48gb", [TRAINED_TOKENS], id="trained-tokens-embedding-in-host-ram"),
        pytest.param("tiny_qlora", "fsdp_offload_2x24gb", [TRAINED_TOKENS], id="trained-tokens-two-ranks-offloaded"),
        pytest.param("tiny_qlora", "fsdp_offload_2x24gb", ["profile.replicas=2"], id="two-copies-in-host-ram"),
        pytest.param(
            "tiny_full", "fsdp_4x48gb", ["profile.replicas=2", SMALL_STATES], id="full-two-copies-of-two-ranks"
        ),
    ],
)
def test_the_shipped_answers_are_learned_by_heart(recipe, profile, extra, tmp_path):
    """As in `make demo` on the CPU, where the training loss goes from 8 to 0.2."""
    base, data, run = (tmp_path / name for name in ("base", "data", "run"))
    sets = [f"base.model={base}", f"data.prepared={data}", "profile.micro_batch=1", "training.logging_steps=1", *extra]
    flags = [part for item in [*sets, "training.report_to=none"] for part in ("--set", item)]
    for command in (
        ["-m", "fitune.demo.tiny_base", base],
        ["cli.py", "prepare", recipe, *flags],
        ["cli.py", "train", recipe, "--profile", profile, "--output", run, *flags],
    ):
        done = call(command, cap_gib=8)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    print(f"{recipe} {profile} {extra}: loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    assert losses[0] > 7 and losses[-1] < 0.5


@needs_fp8
@pytest.mark.parametrize("profile", ["fsdp_1x48gb", "fsdp_2x40gb"])
def test_lora_in_fp8_takes_the_memory_that_plan_says(profile, bf16_checkpoint, tmp_path):
    """In a few steps; and loaded, which ends with the head, the layers' linears are half as large as in bf16."""
    sets = ["training.max_steps=3", "training.logging_steps=1", "profile.embedding_offload=false"]
    sets += ["profile.kept_layers=0", "profile.replicas=1"]
    flags = [*flags_of_small_rows(bf16_checkpoint, tmp_path), *(part for item in sets for part in ("--set", item))]
    held = {}
    for compute in ("bf16", "fp8"):
        run = tmp_path / compute
        command = ["cli.py", "train", "llama3_8b_lora", "--profile", profile, "--output", run, *flags]
        done = call([*command, "--set", f"profile.compute={compute}"], cap_gib=16)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        measured = json.loads((run / "measurements.json").read_text())
        logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        [planned] = {line["gpu_memory_planned_gib"] for line in logged if "gpu_memory_planned_gib" in line}
        held[compute] = [rank["loading"]["peak_allocated_gib"] for rank in measured["ranks"]]
        peak = measured["peak_allocated_gib"]
        print(f"{profile} {compute}: plan {planned:.3f} GiB, peak {peak:.3f}, loaded {held[compute]}")
        assert abs(peak - planned) < 0.05 * planned
    linears = 2 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096) / len(held["fp8"]) / 2**30
    for in_bf16, in_fp8 in zip(held["bf16"], held["fp8"], strict=True):
        assert abs(in_bf16 - in_fp8 - linears) < 0.05


def test_one_rank_trains_alike_with_weights_in_host_ram(checkpoint, tmp_path):
    """Two passes a step. Forward adds up in one order wherever weights lie, backward and AdamW on the CPU in others.

    The first rate is 0, so two steps have the same weights to the bit.
    """
    sets = ["training.max_steps=4", "training.logging_steps=1", "training.lr_scheduler_type=constant_with_warmup"]
    sets += ["training.warmup_steps=2", "profile.kept_layers=0"]
    flags = [*flags_of_small_rows(checkpoint, tmp_path), *(part for item in sets for part in ("--set", item))]
    losses = {}
    for profile in ("single_gpu", "fsdp_1x48gb", "fsdp_offload_1x12gb"):
        done = call(
            ["cli.py", "train", "llama3_8b_qlora", "--profile", profile, "--output", tmp_path / profile, *flags]
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        lines = map(json.loads, (tmp_path / profile / "metrics.jsonl").read_text().splitlines())
        losses[profile] = [line["loss"] for line in lines if "loss" in line]
    on_gpu, *in_host_ram = losses.values()
    assert len(on_gpu) == 4
    for found in in_host_ram:
        assert found[:2] == on_gpu[:2] and found == pytest.approx(on_gpu, rel=1e-3), losses


def flags_of_small_rows(checkpoint: Path, folder: Path) -> list[str]:
    """Of a run on `checkpoint` and the shipped rows, which are prepared for it."""
    data = folder / "data"
    rows = ["--dataset", "examples/instructions/instructions.jsonl", "--tokenizer", TOKENIZER, "--template", "plain"]
    prepared = call(["cli.py", "prepare", *rows, "--output", data])
    assert prepared.returncode == 0, prepared.stderr
    sets = [f"base.model={checkpoint}", f"data.prepared={data}", "data.chat_template=plain", "data.system_message=null"]
    sets += ["global_batch_size=2", "profile.micro_batch=1", "training.report_to=none"]
    return [part for item in sets for part in ("--set", item)]


def test_out_of_memory_is_one_line_with_a_way_out(checkpoint, tmp_path):
    flags = flags_of_small_rows(checkpoint, tmp_path)
    command = ["cli.py", "train", "llama3_8b_qlora", "--profile", "single_gpu", "--output", tmp_path / "run", *flags]
    done = call([*command, "--force"], cap_gib=2.7)
    print(done.stderr[-600:])
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if "GPU memory ran out" in line]
    assert "rank 0" in line and "that `plan` says; try --set" in line
    assert "Traceback" not in done.stdout + done.stderr


def call(command: list, cap_gib: float | None = None) -> subprocess.CompletedProcess:
    """Runs Python in the project's root, its ranks held to `cap_gib`."""
    cap = {"FITUNE_GPU_CAP_GIB": str(cap_gib)} if cap_gib else {}
    options = {"cwd": ROOT, "env": os.environ | cap, "capture_output": True, "text": True, "timeout": 240}
    return subprocess.run([sys.executable, *command], **options)


@pytest.mark.parametrize("lengths", [[700, 1, 130, 193], [2100, 2100]], ids=str)
def test_packed_attention_is_sdpa_with_a_block_mask(lengths):
    from torch.nn.functional import scaled_dot_product_attention

    from fitune.model.attention import packed_attention

    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    mask = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool().cuda()
    shapes = [(1, heads, sum(lengths), 128) for heads in (8, 2, 2)]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    grouped = [exact[0], *(x.repeat_interleave(4, dim=1) for x in exact[1:])]

    output, _ = packed_attention(None, *inputs, None, cu_seq_lens_q=bounds, max_length_q=max(lengths))
    expected = scaled_dot_product_attention(*grouped, attn_mask=mask).transpose(1, 2)
    weight = torch.randn_like(expected)
    (output * weight.to(output.dtype)).sum().backward()
    (expected * weight).sum().backward()

    for ours, reference in [(output, expected), *((a.grad, b.grad) for a, b in zip(inputs, exact, strict=True))]:
        assert ours.shape == reference.shape
        assert (ours - reference).norm() < 0.01 * reference.norm()


def test_layers_count_while_python_waits_for_the_gpu():
    """Seconds of queued work: the thread that counts is not held up by the one that waits."""
    from fitune.launching.heartbeat import GpuProgress

    times = []
    progress = GpuProgress(lambda: times.append(time.monotonic()))
    for _ in range(4):
        torch.cuda._sleep(2_000_000_000)  # cycles, about a second
        progress.count_when_computed()
    assert not times
    progress.start()
    torch.cuda.synchronize()
    over = time.monotonic()
    assert 2 <= sum(moment < over - 0.5 for moment in times) < 4
