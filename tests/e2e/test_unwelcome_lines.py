"""What the run of the real commands takes for a library's warning, and what it lets pass."""

import pytest
from real_commands import unwelcome_lines


@pytest.mark.parametrize(
    "line",
    [
        "Traceback (most recent call last):",
        "site.py:3: UserWarning: deprecated",
        "[rank0]:W1127 01:02:03.4 fsdp.py:3] Warning: 1 of the 2 modules passed to fully_shard did not run forward",
        "Failed to load CPU gemm_4bit_forward from kernels-community",
    ],
)
def test_tracebacks_and_warnings_are_found_between_progress_bars(line):
    assert unwelcome_lines(f"  0%|    | 0/5\r 20%|#   | 1/5\r{line}\nloss 2.1\n") == [line]


def test_what_the_model_says_is_no_warning():
    assert unwelcome_lines("│ A warning? │ I warn you. │\nwarm-up: 3 steps\n") == []
