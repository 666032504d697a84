"""Triton kernels. Each has its definition in plain PyTorch one package up, and is imported only for a GPU.

Of tensors without numbers a kernel makes what it would make, and nothing runs, so a rehearsal takes the memory of the
call.
"""

from __future__ import annotations


def cdiv(number: int, by: int) -> int:
    """The quotient, rounded up. Triton's own takes 10 us, as long as the rest of a launch."""
    return -(-number // by)


def next_power_of_2(number: int) -> int:
    """The least power of two that is no smaller."""
    return 1 << (number - 1).bit_length()
