"""Triton's kernels launched again without Triton's way through Python: a layer's pass has a dozen launches.

For each launch Triton binds all arguments, writes out a key and compares the globals that the kernel reads. Here
arguments that Triton would compile the same kernel for go to the one that it has compiled.
"""

from functools import partial

INT32, INT64 = range(-(2**31), 2**31), range(-(2**63), 2**63)


class Launched:
    """A `triton.jit` function, launched as ever: `kernel[grid](arguments, CONSTANT=value, num_warps=4)`.

    Constants are given by name, all else by position: tensors of the current device, ints and floats.
    """

    def __init__(self, kernel):
        self.kernel = kernel
        self._known: dict[tuple, tuple] = {}
        "By what Triton compiles for: the compiled kernel, and the constants in its order."

    def __getitem__(self, grid: tuple[int, ...]):
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments, **named) -> None:
        kinds, addresses = [], 0
        for argument in arguments:
            kind = argument.__class__
            if kind is int:
                kinds.append(_kind_of(argument))
            elif kind is float:
                kinds.append(kind)
            else:
                kinds.append(argument.dtype)
                addresses |= argument.data_ptr()
        key = (arguments[0].get_device(), *kinds, *named.items())
        if addresses & 15:  # Triton compiles for each argument that is aligned; here all are, or none is looked up
            self.kernel[grid](*arguments, **named)
        elif (known := self._known.get(key)) is not None:
            compiled, constants = known
            compiled[(*grid, 1, 1)](*arguments, *constants)
        elif (compiled := self.kernel[grid](*arguments, **named)) is not None:  # Triton's interpreter compiles nothing
            names = self.kernel.arg_names[len(arguments) :]
            self._known[key] = compiled, tuple(named[name] for name in names)


def _kind_of(number: int) -> tuple:
    """Numbers alike for Triton: 1, multiples of 16, others, each by its type."""
    return number == 1, number & 15 == 0, number in INT32, number in INT64
