"""Loss, perplexity and token accuracy of a model's folder, or an adapter's, that several processes hold.

    accelerate launch --config_file X.yaml -m fitune.training.evaluate_model RUN TOKENS

RUN is a folder that `model_run.run_to_ask` wrote, TOKENS a file of `evaluate_folder.tokenise`.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from fitune.config.schema import Run
from fitune.data.token_file import TokenFile
from fitune.model.skeleton import decoder
from fitune.progress import bar
from fitune.training.distributed import as_rank, close_process_group, compute_device, is_main_process, join
from fitune.training.evaluate_folder import Row, metrics, print_report, read_rows
from fitune.training.given_model import model_of
from fitune.training.load_given import load_over_processes
from fitune.training.loss import add_answer_loss, find_answers
from fitune.training.out_of_memory import explain_in_eval
from fitune.training.train import run_stage


def evaluate_model(run: Run, tokens: Path) -> dict:
    """{"model": metrics, "rows": N} of what `run_to_ask` made `run` for; printed. Call on all ranks."""
    mesh, given = join(run), model_of(run)
    rows = read_rows(TokenFile(tokens))
    model = load_over_processes(run, given, mesh)
    add_answer_loss(decoder(model))
    with bar("evaluating", math.ceil(len(rows) / mesh.size()), show=is_main_process()) as advance:
        totals = _totals(model, rows, mesh.get_rank(), mesh.size(), compute_device(mesh), advance)
    report = {"model": metrics([totals]), "rows": len(rows)}
    if is_main_process():
        print_report(report)
    close_process_group()
    return report


@torch.no_grad()
def _totals(
    model, rows: list[Row], rank: int, ranks: int, device: torch.device, on_pass: Callable[[], None]
) -> tuple[float, int, int]:
    """Loss, right tokens and tokens over all rows, each read by one rank.

    All ranks make as many passes, as they gather each layer together: what fills up the last one is not counted.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for first in range(0, len(rows), ranks):
        mine = first + rank
        ids, labels = (torch.tensor(part, device=device)[None] for part in rows[min(mine, len(rows) - 1)])
        answers = find_answers(labels)
        found = model(input_ids=ids, answers=answers, use_cache=False)
        if mine < len(rows):
            sums += torch.tensor([float(found.loss), float(found.right), len(answers.tokens)], dtype=torch.float64)
        on_pass()
    dist.all_reduce(sums)
    loss, right, tokens = sums.tolist()
    return loss, int(right), int(tokens)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fitune.training.evaluate_model", description=__doc__)
    parser.add_argument("run", type=Path, help="a folder that run_to_ask wrote")
    parser.add_argument("tokens", type=Path, help="held-out rows, tokenised")
    options = parser.parse_args(arguments)
    run_stage(options.run, partial(evaluate_model, tokens=options.tokens), explain_in_eval)


if __name__ == "__main__":
    as_rank(main)
