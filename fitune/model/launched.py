"""Triton's kernels launched again without Triton's way through Python: a layer's pass has a dozen launches.

For each launch Triton binds all arguments, writes out a key and compares the globals that the kernel reads. Here
arguments that Triton would compile the same kernel for go to the one that it has compiled.
"""

from functools import partial


class Launched:
    """A `triton.jit` function, launched as ever: `kernel[grid](arguments, CONSTANT=value, num_warps=4)`.

    Constants are given by name, all else by position: tensors, floats, and numbers of a layer's sizes. Numbers that
    change in every step are none of those: each would be kept.
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
            if argument.__class__ is int:
                kinds.append(argument)
            elif argument.__class__ is float:
                kinds.append(float)
            else:
                kinds.append(argument.dtype)
                addresses |= argument.data_ptr()
        key = (arguments[0].get_device(), addresses & 15, *kinds, *named.items())
        if (known := self._known.get(key)) is not None:
            compiled, constants = known
            compiled[(*grid, 1, 1)](*arguments, *constants)
            return
        compiled = self.kernel[grid](*arguments, **named)
        if compiled is not None and not addresses & 15:  # Triton's interpreter compiles nothing
            names = self.kernel.arg_names[len(arguments) :]
            self._known[key] = compiled, tuple(named[name] for name in names)
