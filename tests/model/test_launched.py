"""Triton's kernels launched again: which launches go to the same compiled kernel, and with what."""

import pytest
import torch

from fitune.model.launched import Launched


class Kernel:
    """As `triton.jit` makes one: compiles for what it is given, and tells how it was launched."""

    arg_names = ("x", "row", "scale", "WIDE", "BLOCK")

    def __init__(self):
        self.compiled, self.again = [], []

    def __getitem__(self, grid):
        def launch(*arguments, **named):
            self.compiled.append((grid, arguments, named))
            return Compiled(self, len(self.compiled) - 1)

        return launch


class Compiled:
    def __init__(self, kernel: Kernel, number: int):
        self.kernel, self.number = kernel, number

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.again.append((self.number, grid, arguments))


def test_the_second_launch_goes_to_the_compiled_kernel_with_constants_in_its_order():
    kernel, x, other = Kernel(), torch.zeros(16), torch.ones(16)
    launched = Launched(kernel)
    launched[(3,)](x, 32, 0.5, BLOCK=64, WIDE=True, num_warps=8)
    launched[(5, 2)](other, 32, 0.25, BLOCK=64, WIDE=True, num_warps=8)
    assert kernel.compiled == [((3,), (x, 32, 0.5), {"BLOCK": 64, "WIDE": True, "num_warps": 8})]
    [(number, grid, arguments)] = kernel.again
    assert (number, grid[:3]) == (0, (5, 2, 1)) and arguments[0] is other and arguments[1:] == (32, 0.25, True, 64)


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(16, dtype=torch.bfloat16)},
        {"row": 1},
        {"scale": 1},
        {"row": 33},
        {"row": 2**35},
        {"row": 2**63},
        {"WIDE": False},
        {"BLOCK": 128},
        {"num_warps": 4},
    ],
    ids=str,
)
def test_what_triton_compiles_anew_for_is_not_taken_for_the_same(change):
    kernel = Kernel()
    launched = Launched(kernel)
    for given in ({}, change, {}, change):
        found = {"x": torch.zeros(16), "row": 32, "scale": 0.5, "WIDE": True, "BLOCK": 64, "num_warps": 8} | given
        positional = [found.pop(name) for name in ("x", "row", "scale")]
        launched[(1,)](*positional, **found)
    assert len(kernel.compiled) == 2 and [number for number, *_ in kernel.again] == [0, 1]


@pytest.mark.parametrize("rows", [(32, 48, 3072), (33, 7, 3011), (2**35, 2**36)], ids=str)
def test_numbers_of_a_kind_go_to_one_kernel(rows):
    """The tokens of a batch change in every step."""
    kernel = Kernel()
    launched = Launched(kernel)
    for row in rows:
        launched[(1,)](torch.zeros(16), row, 0.5, WIDE=False, BLOCK=64)
    assert len(kernel.compiled) == 1 and [arguments[1] for _, _, arguments in kernel.again] == [*rows[1:]]


def test_memory_that_is_not_aligned_is_left_to_triton():
    kernel = Kernel()
    launched = Launched(kernel)
    for start in (1, 0, 1, 0):
        launched[(1,)](torch.zeros(17)[start:], 32, 0.5, WIDE=False, BLOCK=64)
    assert len(kernel.compiled) == 3 and [number for number, *_ in kernel.again] == [1]


def test_an_interpreter_that_compiles_nothing_is_asked_each_time():
    class Interpreted(Kernel):
        def __getitem__(self, grid):
            return lambda *arguments, **named: self.compiled.append(arguments)

    kernel = Interpreted()
    launched = Launched(kernel)
    for _ in range(2):
        launched[(1,)](torch.zeros(16), 1, 0.5, WIDE=False, BLOCK=64)
    assert len(kernel.compiled) == 2 and not kernel.again
