"""Sizes of a kernel's grid and blocks. Triton's own functions take 2 us of Python a call, as kernels may call them."""


def blocks_of(size: int, block: int) -> int:
    """How many blocks hold `size` elements."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The smallest that is at least `size`."""
    return 1 << (size - 1).bit_length()
