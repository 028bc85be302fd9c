"""Tiny run folders of JSON, as training, `eval` and `generate` leave them."""

import json
import math
import shlex
from pathlib import Path

from fitune.config import run as runs
from fitune.demo.tiny_base import build_tiny_base

EVIL = "<script>document.title = 'run'</script> & \"quoted\" <img src=x onerror=alert(1)>"
STEPS = 40


def write_json(file: Path, content) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


def metrics(steps: int = STEPS, loss: float = 3.0) -> list[dict]:
    lines = []
    for step in range(1, steps + 1):
        rate = 2e-3 * (1 - step / STEPS)
        values = {"loss": loss * math.exp(-step / 20), "grad_norm": 1 + math.sin(step), "learning_rate": rate}
        lines.append({"step": step, **values, "tokens_per_second": 900.0 + step, "seconds": 90.0 * step})
        if step % 10 == 0:
            lines.append({"step": step, "eval_loss": loss * math.exp(-step / 25)})
    return lines


def unfinished_run(folder: Path, lines: list[dict] | None = None, sets: tuple[str, ...] = ()) -> Path:
    """Settings and what was logged."""
    base = folder.parent / "base"
    if not base.is_dir():
        build_tiny_base(base, texts=["a text"], vocab_size=300, num_layers=2)
    data = folder.parent / "data"
    data.mkdir(exist_ok=True)
    sets = (f"base.model={base}", f"data.prepared={data}", f"training.max_steps={STEPS}", *sets)
    folder.mkdir()
    (folder / "run.yaml").write_text(runs.dump(runs.resolve("tiny_qlora", "cpu_2proc", sets, str(folder))))
    lines = metrics(20) if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def finished_run(folder: Path, lines: list[dict] | None = None, sets: tuple[str, ...] = ()) -> Path:
    """All that a page can show."""
    unfinished_run(folder, metrics() if lines is None else lines, sets)
    rank = {"peak_host_rss_gib": 1.25, "loading": {"peak_allocated_gib": 0.0, "peak_host_rss_gib": 0.5, "seconds": 2}}
    write_json(
        folder / "measurements.json",
        {"tokens_per_second": 931.0, "tokens_per_second_per_gpu": 465.5, "load_seconds": 2.5, "ranks": [rank, rank]},
    )
    write_json(folder / "finished.json", {"step": STEPS, "epoch": 2.0})
    write_json(
        folder / "origin.json",
        {
            "starts": [
                {
                    "at": "2026-11-27T09:00:00+00:00",
                    "typed": f"fitune train tiny_qlora --output {shlex.quote(str(folder))}",
                }
            ],
            "versions": {"python": "3.11.2", "torch": "2.13.0"},
            "hardware": {"gpu": None, "gpus": 0, "gpu_memory_gib": None, "host_memory_gib": 15.6, "cores": 2},
            "identity": {"base": EVIL, "data": "d" * 64, "template": "e" * 64, "seed": 42},
        },
    )
    scores = {"loss": 2.5, "perplexity": 12.2, "token_accuracy": 0.4, "tokens": 100}
    write_json(folder / "eval.json", {"base": scores, "tuned": scores | {"loss": 1.25}, "rows": 8})
    answer = {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Say {EVIL}"}],
        "base": f"the red house {EVIL}",
        "tuned": f"the blue house {EVIL}",
        "expected": EVIL,
    }
    write_json(folder / "answers.json", {"max_new_tokens": 256, "temperature": 0.0, "rows": [answer] * 3})
    write_json(
        folder.parent / "data" / "report.json",
        {
            "rows_in": 120, "rows_kept": 100, "train_rows": 90, "test_rows": 10, "packed_rows": 30,
            "packing_efficiency": 0.93, "max_length": 512, "packing": True, "source": {"dataset": EVIL}, "mixed_in": [],
            "dropped": {"answer is empty": 15, EVIL: 5}, "notes": [EVIL],
            "files": {"train.jsonl": {"sha256": "d" * 64}},
            "tokens": {"total": 9000, "trained_share": 0.5, "p50": 60, "p95": 200, "max": 500,
                       "histogram": {"32": 10, "64": 50, "128": 20, "512": 10}},
        },
    )  # fmt: skip
    return folder
