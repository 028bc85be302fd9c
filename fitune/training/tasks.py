"""`eval --tasks`: EleutherAI's lm-eval on a whole model. An optional extra, a library of its own."""

import importlib.util
import json
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fitune.config.schema import Run
from fitune.errors import FituneError, UsageError, nearest
from fitune.export.whole_model import whole_model


def tasks_command(
    given: Path, run: Run | None, tasks: list[str], *, include: Path | None, limit: int | None, file, force: bool
) -> None:
    """Measures and prints; a run or an adapter is merged first, in a temporary folder beside it."""
    refuse_unknown(tasks, include)
    model = whole_model(given, run, force=force)
    with tempfile.TemporaryDirectory(prefix=".fitune-tasks-", dir=given.absolute().parent) as temporary:
        folder = model.make(Path(temporary) / "model")
        print_tasks(measure(folder, tasks, include=include, limit=limit), file)


def refuse_unknown(tasks: list[str], include: Path | None) -> None:
    """UsageError if lm-eval is not installed or does not have one of `tasks`, in its own list or in `include`."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError('eval --tasks uses lm-eval: pip install "lm_eval[hf]"')
    if include and not include.is_dir():
        raise UsageError(f"--include {include}: no such folder; give one with lm-eval's task files")
    from lm_eval.tasks import TaskManager

    known = TaskManager(include_path=str(include) if include else None).all_tasks
    if unknown := next((task for task in tasks if task not in known), None):
        raise UsageError(f"--tasks {unknown}: lm-eval has no such task{nearest(unknown, known)}")


def measure(model: Path, tasks: list[str], *, include: Path | None, limit: int | None) -> dict[str, dict]:
    """Task -> metric -> value, of a model's folder. Data sets come from where the tasks say, mostly the Hub."""
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = simple_evaluate(
            model="hf",
            model_args={
                "pretrained": str(model),
                "dtype": "auto",
                "softmax_dtype": "float32",
            },  # bf16's sums are coarse
            tasks=tasks,
            task_manager=TaskManager(include_path=str(include) if include else None),
            limit=limit,
            batch_size=1,
            device=device,
            bootstrap_iters=0,
        )
    except (OSError, ConnectionError) as error:  # no network, or no room for a data set
        raise FituneError(f"eval --tasks {','.join(tasks)}: {str(error).splitlines()[0]}") from None
    return {task: _numbers(values) for task, values in found["results"].items()}


def _numbers(values: dict) -> dict[str, float]:
    """lm-eval names a metric with its filter: `acc,none`."""
    named = {key.removesuffix(",none"): value for key, value in values.items()}
    return {key: value for key, value in named.items() if isinstance(value, int | float) and "_stderr" not in key}


def print_tasks(results: dict[str, dict], file: Path | None) -> None:
    table = Table()
    for column in ("task", "metric", "value"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for task, metrics in results.items():
        for metric, value in metrics.items():
            table.add_row(task, metric, f"{value:.4f}")
    Console().print(table)
    if file:
        file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
