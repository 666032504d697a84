"""Which device a computation without numbers stands for.

A call is rehearsed on the meta device to learn what it will take of memory. There, operations must choose as they will
in the call: kernels and layouts of a GPU are not those of a CPU. A tensor on the meta device cannot say where the call
is going to be, so whoever rehearses does, for as long as the rehearsal lasts and for its own thread only. It changes no
number: nothing but tensors without numbers is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_REHEARSED: ContextVar[torch.device | None] = ContextVar("rehearsed device", default=None)


def device_of(x: Tensor) -> torch.device:
    """Where x is; in a rehearsal, where it would be in the call."""
    return (_REHEARSED.get() or x.device) if x.is_meta else x.device


@contextmanager
def rehearsing(device: torch.device) -> Iterator[None]:
    """Within it, tensors on the meta device stand for tensors on this one."""
    before = _REHEARSED.set(device)
    try:
        yield
    finally:
        _REHEARSED.reset(before)
