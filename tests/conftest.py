"""Fixtures that tests share: tiny base models, prepared conversations, and runs without YAML files."""

import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: ranks share few cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # with more threads than cores those that wait would keep them busy

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit it ignored

WORDS = """river stone letter winter garden copper window morning silent paper harbour bread market candle orange
travel answer question mountain simple colour number before after between because often seldom bright heavy"""


def conversation(generator: random.Random) -> dict:
    """A conversation of one to three exchanges, some with a system message, lengths well mixed."""

    def words(low, high):
        return " ".join(generator.choices(WORDS.split(), k=generator.randint(low, high))).capitalize() + "."

    messages = [{"role": "system", "content": words(3, 8)}] if generator.random() < 0.4 else []
    for _ in range(generator.randint(1, 3)):
        messages.append({"role": "user", "content": words(2, 12)})
        messages.append({"role": "assistant", "content": words(1, 16)})
    return {"messages": messages}


def conversations(count: int, seed: int) -> list[dict]:
    generator = random.Random(seed)
    return [conversation(generator) for _ in range(count)]


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """What a command set that ran in the test's own process is not there for the next test."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """What `prepare` leaves: train.jsonl (48 conversations) and test.jsonl (8)."""
    folder = tmp_path_factory.mktemp("prepared")
    for split, count, seed in (("train", 48, 1), ("test", 8, 2)):
        write_split(folder, split, count, seed)
    return folder


@pytest.fixture
def cli(monkeypatch, tmp_path):
    """Runs a command line in an empty folder; returns click's result."""
    from click.testing import CliRunner

    from fitune.cli import cli as group

    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(group, [str(argument) for argument in arguments])


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch) -> Callable[..., None]:
    """Puts a program in PATH that answers as nvidia-smi would: `nvidia_smi(rows)`, as `put_in_path` has it."""
    from fake_nvidia_smi import put_in_path

    return partial(put_in_path, tmp_path, monkeypatch)


def write_split(folder: Path, split: str, count: int, seed: int) -> None:
    lines = [json.dumps(row) + "\n" for row in conversations(count, seed)]
    (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def build_base(folder: Path, **options) -> Path:
    from fitune.demo.tiny_base import build_tiny_base

    texts = [message["content"] for row in conversations(48, 1) for message in row["messages"]]
    return build_tiny_base(folder, texts=texts, num_layers=2, num_heads=4, num_kv_heads=2, **options)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """An untrained Llama of two layers, stored in float32."""
    import torch

    folder = tmp_path_factory.mktemp("models") / "tiny"
    return build_base(folder, vocab_size=512, hidden_size=64, intermediate_size=192, dtype=torch.float32)


@pytest.fixture(scope="session")
def uneven_base(tmp_path_factory) -> Path:
    """The same with sizes that 2 and 3 ranks don't divide, stored in bfloat16 in several files.

    Borders between 3 ranks fall inside NF4 blocks of 64 weights.
    """
    folder = tmp_path_factory.mktemp("models") / "uneven"
    return build_base(folder, vocab_size=509, hidden_size=64, intermediate_size=320, max_shard_bytes=100_000)


@pytest.fixture(scope="session")
def tied_base(uneven_base, tmp_path_factory) -> Path:
    """The same with an embedding that is also the head, stored once."""
    from bases import base_like

    return base_like(uneven_base, tmp_path_factory.mktemp("models") / "tied", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def larger_base(tmp_path_factory) -> Path:
    """62 M parameters in four layers, 118 MiB in bfloat16: enough to see in a process's memory."""
    from fitune.demo.tiny_base import build_tiny_base

    folder = tmp_path_factory.mktemp("models") / "larger"
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_layers": 4, "num_heads": 8, "num_kv_heads": 4}
    return build_tiny_base(folder, texts=["a text"], vocab_size=300, **sizes)


@pytest.fixture
def plain_linear4bit(monkeypatch):
    """bitsandbytes' Linear4bit as it computes everywhere but in evaluation on CPUs with AVX512-BF16.

    There it rearranges its weights for a kernel that rounds activations and statistics to bfloat16, and refuses many
    shapes.
    """
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.fixture
def quick_ranks(monkeypatch) -> None:
    """Ranks of a command that runs in the test's own process start at once: see `tests/quick_python.py`."""
    from quick_python import rank

    monkeypatch.setattr("torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler.Popen", rank)


@pytest.fixture(scope="session")
def make_run(prepared):
    """A factory of runs on CPU processes: `make_run(base, folder, "lora", processes=2, training={...})`.

    Gradient accumulation follows from `batch`, `micro_batch` and `processes`; further keywords go to the recipe.
    """
    from fitune import __version__
    from fitune.config.recipe import Recipe
    from fitune.config.schema import AccelerateConfig, Profile, Run

    def make(
        base: Path,
        folder: Path,
        method: str = "qlora",
        *,
        processes: int = 1,
        batch: int | None = None,
        micro_batch: int = 1,
        lora: dict | None = None,
        mixed_precision: str = "no",
        offload_params: bool = False,
        embedding_offload: bool = False,
        compute: str = "auto",
        optimizer_state: str = "fp32",
        optimizer_offload: bool = False,
        reduce_dtype: str = "bf16",
        reshard_after_forward: bool = True,
        async_save: bool = True,
        machines: int = 1,
        replicas: int = 1,
        training: dict | None = None,
        chat_template: str = "llama3",
        **recipe,
    ) -> Run:
        batch = batch or micro_batch * processes
        return Run(
            fitune=__version__,
            recipe_name="test",
            profile_name="test",
            output_dir=str(folder),
            recipe=Recipe.model_validate(
                {
                    "description": "A test.",
                    "base": {"model": str(base)},
                    "data": {"dataset": "none", "prepared": str(prepared), "chat_template": chat_template},
                    "method": method,
                    "lora": None if method == "full" else {"r": 4, "dropout": 0.0} | (lora or {}),
                    "max_length": 256,
                    "packing": False,
                    "global_batch_size": batch,
                    "training": {"report_to": "none", "logging_steps": 1, "save_strategy": "no"} | (training or {}),
                }
                | recipe
            ),
            profile=Profile(
                description="A test.",
                accelerate_config="test",
                num_gpus=0,
                host_memory_gib=1,
                fits={"tiny": [method]},
                micro_batch=micro_batch,
                kept_layers=0,
                embedding_offload=embedding_offload,
                compute=compute,
                optimizer_state=optimizer_state,
                optimizer_offload=optimizer_offload,
                reduce_dtype=reduce_dtype,
                async_save=async_save,
                replicas=replicas,
            ),
            accelerate=AccelerateConfig(
                path="test.yaml",
                num_processes=processes,
                num_machines=machines,
                use_cpu=True,
                mixed_precision=mixed_precision,
                offload_params=offload_params,
                reshard_after_forward=reshard_after_forward,
            ),
            gradient_accumulation_steps=-(-batch // (micro_batch * processes)),
        )

    return make
