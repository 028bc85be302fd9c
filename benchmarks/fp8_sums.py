"""What a weight's gradient in fp8 loses to how tensor cores add up, and what adding up in float32 costs.

    python benchmarks/fp8_sums.py RESULT.json [--commit COMMIT]

dW = dy^T x of random numbers with a mean, rounded to e4m3 as `fitune.model.trained_fp8` rounds them, multiplied
with `use_fast_accum` and without, beside the same product of the same numbers in float64. Needs a GPU with fp8.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tier_run import about

from fitune.model.fp8_rounding import ones, product, quantise_columns, quantise_rows, round_columns

TOKENS, MEANS = (6144, 98304), (0.0, 0.5, 2.0)
"A pass of two rows of 3,072, and a long one; means in standard deviations."
OUTPUTS, INPUTS = 512, 1024
LINEARS = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336)}
"Of 8B, [out, in]."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    torch.manual_seed(0)
    sums = [_errors(tokens, mean) for tokens in TOKENS for mean in MEANS]
    times = [{"linear": name, "tokens": TOKENS[0], **_times(*shape)} for name, shape in LINEARS.items()]
    report = about(options.commit) | {"command": " ".join(sys.argv), "errors": sums, "microseconds": times}
    options.result.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for line in (*sums, *times):
        print(line)


def _errors(tokens: int, mean: float) -> dict:
    """Norms of what is wrong in dW, of dW's own, and the mean of what is missing, of the mean of |dW|."""
    x, dy = ((torch.randn(tokens, size, device="cuda") + mean).bfloat16() for size in (INPUTS, OUTPUTS))
    z, c, columns = _rounded(x, dy)
    exact = (z.double() @ columns.double().t()) * c.double().unsqueeze(1)
    found = {"tokens": tokens, "mean": mean}
    for name, fast in (("fast", True), ("float32", False)):
        sums = _product(z, c, columns, fast=fast).double()
        found[f"{name}_error"] = ((sums - exact).norm() / exact.norm()).item()
        found[f"{name}_missing"] = ((exact.abs() - sums.abs()).mean() / exact.abs().mean()).item()
    unrounded = dy.double().t() @ x.double()
    found["rounding_error"] = ((exact - unrounded).norm() / unrounded.norm()).item()
    found["bf16_error"] = (((dy.t() @ x).double() - unrounded).norm() / unrounded.norm()).item()
    return found


def _times(outputs: int, inputs: int) -> dict:
    x, dy = (torch.randn(TOKENS[0], size, device="cuda", dtype=torch.bfloat16) for size in (inputs, outputs))
    rounded = _rounded(x, dy)
    timed = {"fast": lambda: _product(*rounded, fast=True), "float32": lambda: _product(*rounded, fast=False)}
    return {name: round(1000 * do_bench(work, return_mode="median"), 1) for name, work in timed.items()}


def _rounded(x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(Z, its scales, X turned)"""
    _, scales = quantise_rows(x)
    return *quantise_columns(dy, scales), round_columns(x, scales)


def _product(z: torch.Tensor, c: torch.Tensor, columns: torch.Tensor, *, fast: bool) -> torch.Tensor:
    out = torch.empty(len(z), len(columns), device="cuda", dtype=torch.bfloat16)
    return product(z, c, columns, ones(len(columns), z.device), out, fast=fast)


if __name__ == "__main__":
    main()
