"""What a model card says of the losses that were measured, up to the step whose weights it describes."""

import json
import re
from pathlib import Path

from fitune.config.json_file import json_or_nothing
from fitune.config.schema import Run


def losses_section(run: Run) -> str:
    """`eval`'s table where it was run, and the last losses of training; "" where nothing was measured."""
    blocks = [_evaluation(run), *_of_training(run)]
    return "\n\n".join(["## Losses", *filter(None, blocks)]) if any(blocks) else ""


def _evaluation(run: Run) -> str:
    name = f"eval-{Path(run.checkpoint).name}.json" if run.checkpoint else "eval.json"
    report = json_or_nothing(run.folder / name)
    if not report:
        return ""
    lines = ["| held-out rows | loss | perplexity | token accuracy |", "|---|---|---|---|"]
    for label in ("base", "tuned"):
        m = report[label]
        lines.append(f"| {label} | {m['loss']:.4f} | {m['perplexity']:.2f} | {m['token_accuracy']:.1%} |")
    return "\n".join(lines)


def _of_training(run: Run) -> list[str]:
    logged, best = _logged(run), _best_step(run)
    limit = _step_of_checkpoint(run) or best
    until = [line for line in logged if limit is None or line.get("step", 0) <= limit]
    said = []
    if best and len(until) < len(logged):
        said.append(f"Result: step {best}, the best evaluation; training went on to step {logged[-1]['step']}.")
    if found := [line for line in until if "loss" in line]:
        named, unlike = _named(run.recipe.training)
        said.append(f"Last training loss{named}: {found[-1]['loss']:.4f}, step {found[-1]['step']}.{unlike}")
    if found := [line for line in until if "eval_loss" in line]:
        beside = ", beside the base rounded to fp8" * run.keeps_base_in_fp8
        line = found[-1]
        said.append(f"Last held-out loss while training{beside}: {line['eval_loss']:.4f}, step {line['step']}.")
    return said


def _named(training: dict) -> tuple[str, str]:
    """What the loss of training is, and that held-out losses are not so; nothing where both are the same loss."""
    loss_type, smoothing = training.get("loss_type", "nll"), training.get("label_smoothing_factor")
    names = [f"loss_type {loss_type}"] if loss_type != "nll" else []
    names += [f"label_smoothing_factor {smoothing}"] if smoothing else []
    if not names:
        return "", ""
    return f" ({', '.join(names)})", " Held-out losses are the plain negative log-likelihood: do not compare the two."


def _step_of_checkpoint(run: Run) -> int | None:
    match = re.search(r"-(\d+)$", run.checkpoint) if run.checkpoint else None
    return int(match.group(1)) if match else None


def _best_step(run: Run) -> int | None:
    """The step whose weights a run's result has, where training went on after it."""
    if run.checkpoint or not run.recipe.training.get("load_best_model_at_end"):
        return None
    noted = [json_or_nothing(run.folder / name).get("result_step") for name in ("best.json", "finished.json")]
    return noted[0] or noted[1]  # best.json is there while the result is written


def _logged(run: Run) -> list[dict]:
    """Lines of metrics.jsonl, but for one that is half written."""
    file = run.folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
