"""Loss, perplexity and token accuracy on the held-out rows, base against tuned, sharded as in training.

accelerate launch --config_file X.yaml -m fitune.training.evaluate RUN
"""

import argparse
import contextlib
import json
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import DeviceMesh

from fitune.config.hub import local_folder
from fitune.config.schema import Run
from fitune.data.dataset import TokenisedRows, load_tokenizer
from fitune.data.prepared import check_prepared
from fitune.export.chat_record import refuse_another_chat
from fitune.export.model_card import write_model_card
from fitune.launching.finished import Measuring
from fitune.launching.heartbeat import Heartbeat
from fitune.progress import bar
from fitune.training.asked_here import as_held
from fitune.training.distributed import as_rank, close_process_group, is_main_process, join
from fitune.training.given_run import on_other_rows
from fitune.training.out_of_memory import explain_in_eval
from fitune.training.token_metrics import token_metrics
from fitune.training.train import free_model_memory, load_sharded_model, rows_on_all_ranks, run_stage
from fitune.training.trainer import ShardedSFTTrainer
from fitune.training.tuned import load_tuned_weights, tuned_base_folder


def evaluate(run: Run, force: bool = False, data: Path | None = None) -> None:
    """Writes eval.json to the run's folder: {"base": metrics, "tuned": metrics, "rows": held-out rows}.

    For `run.checkpoint` it is eval-checkpoint-N.json, for a prepared folder `data` of other rows eval-NAME.json.
    `force` evaluates also on a base that may not be the adapter's own.
    """
    run, measuring = on_other_rows(run, data) if data else run, Measuring(run.folder)
    mesh = join(run)
    base_folder = local_folder(run.recipe.base.model, run.recipe.base.revision)
    tokenizer = load_tokenizer(run.recipe, base_folder)
    refuse_another_chat(run, tokenizer)
    check_prepared(run.recipe, tokenizer, is_trained=True)
    rows = rows_on_all_ranks(run, "test", tokenizer, Heartbeat())
    measured = partial(_measured, run, tokenizer=tokenizer, mesh=mesh, rows=rows)
    tuned_folder = tuned_base_folder(run, base_folder, force)
    if run.recipe.method != "full":  # an adapter, switched off and on
        results = measured(base_folder, "base", "tuned")
    else:  # one after the other, as GPUs have room for one
        results = measured(base_folder, "base")
        free_model_memory()
        results |= measured(tuned_folder, "tuned")
    if is_main_process():
        report = {**results, "rows": len(rows.tokens)}
        names = ["eval", *([Path(run.checkpoint).name] if run.checkpoint else []), *([data.name] if data else [])]
        measuring.file("-".join(names)).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if not (run.checkpoint or data) and measuring.is_the_results:  # a checkpoint's files are hashed
            write_model_card(run.result_folder, run, run.recipe.base.model, run.recipe.base.revision, base_folder)
        Console().print(evaluation_table(report))
    close_process_group()


def _measured(
    run: Run, folder: Path, *labels: str, tokenizer, mesh: DeviceMesh, rows: TokenisedRows
) -> dict[str, dict[str, float]]:
    """Metrics, by label, of the model whose weights are in `folder`; for `base` without an adapter."""
    model = load_sharded_model(run, folder, tokenizer, mesh)
    if "tuned" in labels:
        load_tuned_weights(run, model, mesh)
    trainer = ShardedSFTTrainer(run, model=model, processing_class=tokenizer, train_dataset=rows, eval_dataset=rows)
    batches, found = trainer.get_eval_dataloader(), {}
    for label in labels:
        adapter_off = label == "base" and hasattr(model, "disable_adapter")
        with (
            model.disable_adapter() if adapter_off else contextlib.nullcontext(),
            bar(f"evaluating {label}", len(batches), show=is_main_process()) as advance,
        ):
            found[label] = token_metrics(trainer.model, batches, advance)
    return found


def evaluation_table(report: dict[str, dict | int]) -> Table:
    """Of `eval`'s report: metrics by the name of what was measured, and the number of rows."""
    measured = {name: metrics for name, metrics in report.items() if name != "rows"}
    tokens = next(iter(measured.values()))["tokens"]
    table = Table(title=f"held-out rows: {report['rows']}, answer tokens: {tokens}")
    for column in ("", "loss", "perplexity", "token accuracy"):
        table.add_column(column, justify="left" if not column else "right")
    for label, metrics in measured.items():
        numbers = (f"{metrics['loss']:.4f}", f"{metrics['perplexity']:.2f}", f"{metrics['token_accuracy']:.1%}")
        table.add_row(label, *numbers)
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fitune.training.evaluate", description=__doc__)
    parser.add_argument("run", type=Path, help="run.yaml, or the folder that holds it")
    parser.add_argument("--force", action="store_true", help="on a base that may not be the adapter's own, too")
    parser.add_argument("--checkpoint", help="a checkpoint of the run, instead of its result")
    parser.add_argument("--data", type=Path, help="a prepared folder whose test rows are taken instead of the run's")
    parser.add_argument("--held-by", type=Path, help="the accelerate config that starts it, if it is not the run's")
    parser.add_argument("--rows", type=int, help="a pass, where the run's own are too many here")
    options = parser.parse_args(arguments)

    def held(run: Run) -> Run:
        return as_held(run, options.held_by, options.rows)

    run_stage(
        options.run,
        lambda run: evaluate(held(run), options.force, options.data),
        lambda run, *failed: explain_in_eval(held(run), *failed),
        checkpoint=options.checkpoint,
    )


if __name__ == "__main__":
    as_rank(main)
