"""Loss, perplexity and token accuracy on the held-out rows, base against tuned, sharded as in training.

accelerate launch --config_file X.yaml -m fitune.training.evaluate RUN
"""

import argparse
import contextlib
import json
import math
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from rich.console import Console
from rich.table import Table

from fitune.config.hub import local_folder
from fitune.config.schema import Run
from fitune.data.dataset import load_split, load_tokenizer
from fitune.progress import bar
from fitune.training.distributed import compute_device, is_main_process, join, leave
from fitune.training.train import load_sharded_model, run_stage
from fitune.training.trainer import ShardedSFTTrainer
from fitune.training.tuned import load_tuned_weights, tuned_base_folder


def evaluate(run: Run, force: bool = False) -> None:
    """Writes eval.json to the run's folder: {"base": metrics, "tuned": metrics, "rows": held-out rows}.

    For `run.checkpoint` it is eval-checkpoint-N.json.
    `force` evaluates also on a base that may not be the adapter's own.
    """
    mesh = join(run.accelerate)
    base_folder = local_folder(run.recipe.base.model, run.recipe.base.revision)
    tokenizer = load_tokenizer(run.recipe, base_folder)
    rows = load_split(run.recipe, "test", run.folder / "cache")
    results = {}
    for label, folder in (("base", base_folder), ("tuned", tuned_base_folder(run, base_folder, force))):
        if label == "base" or folder != base_folder:  # an adapter is switched off and on; a full model is loaded anew
            model = load_sharded_model(run, folder, tokenizer, mesh)
            load_tuned_weights(run, model, mesh)
            trainer = ShardedSFTTrainer(run, model=model, processing_class=tokenizer, train_dataset=rows)
        adapter_off = label == "base" and hasattr(model, "disable_adapter")
        with model.disable_adapter() if adapter_off else contextlib.nullcontext():
            results[label] = token_metrics(trainer, f"evaluating {label}", compute_device(mesh))
    if is_main_process():
        report = {**results, "rows": len(rows)}
        name = f"eval-{Path(run.checkpoint).name}.json" if run.checkpoint else "eval.json"
        (run.folder / name).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        Console().print(_table(report))
    leave()


@torch.no_grad()
def token_metrics(trainer: ShardedSFTTrainer, description: str, device: torch.device) -> dict[str, float]:
    """Mean loss (nats), perplexity and accuracy over all answer tokens of the trainer's rows, each counted once.

    Rows are dealt out to the ranks in turn. The trainer filled them up to whole batches with rows that have no labels:
    every rank must take part in gathering each layer.
    """
    rows, size = trainer.train_dataset, trainer.args.per_device_eval_batch_size
    rank, world_size = dist.get_rank(), dist.get_world_size()
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # log-likelihood, correct tokens, tokens
    trainer.model.eval()
    passes = len(rows) // (world_size * size)
    with bar(description, passes, show=is_main_process()) as advance:
        for step in range(passes):
            indices = [(step * size + offset) * world_size + rank for offset in range(size)]
            batch = send_to_device(trainer.data_collator([rows[index] for index in indices]), device)
            output = trainer.model(**batch, use_cache=False, fused_lm_head=True)
            totals += torch.stack([output.log_probs.sum(), output.is_top1.sum(), output.label_mask.sum()])
            advance()
    dist.all_reduce(totals)
    log_likelihood, correct, tokens = totals.tolist()
    loss = -log_likelihood / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "token_accuracy": correct / tokens,
        "tokens": int(tokens),
    }


def _table(report: dict) -> Table:
    table = Table(title=f"held-out rows: {report['rows']}, answer tokens: {report['base']['tokens']}")
    for column in ("", "loss", "perplexity", "token accuracy"):
        table.add_column(column, justify="left" if not column else "right")
    for label in ("base", "tuned"):
        metrics = report[label]
        numbers = (f"{metrics['loss']:.4f}", f"{metrics['perplexity']:.2f}", f"{metrics['token_accuracy']:.1%}")
        table.add_row(label, *numbers)
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fitune.training.evaluate", description=__doc__)
    parser.add_argument("run", type=Path, help="run.yaml, or the folder that holds it")
    parser.add_argument("--force", action="store_true", help="on a base that may not be the adapter's own, too")
    parser.add_argument("--checkpoint", help="a checkpoint of the run, instead of its result")
    options = parser.parse_args(arguments)
    run_stage(options.run, lambda run: evaluate(run, options.force), checkpoint=options.checkpoint)


if __name__ == "__main__":
    main()
