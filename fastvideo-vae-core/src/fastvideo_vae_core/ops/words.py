"""Copies in whole words.

Where one of two tensors has gaps in memory, PyTorch copies number by number; on an H100 it moves 0.4 TB/s of 16-bit
numbers so, and 2.5 TB/s of words (see `ops.nearest`). Where channels lie side by side there are words to copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = torch.int64


def copy_rows(into: Tensor, source: Tensor) -> None:
    """Copy rows of channels (..., C) into others of their shape. The same as `into.copy_(source)`."""
    differentiates = torch.is_grad_enabled() and source.requires_grad
    if not differentiates and into.dtype == source.dtype and _in_words(into) and _in_words(source):
        into, source = into.view(_WORD), source.view(_WORD)
    into.copy_(source)


def _in_words(rows: Tensor) -> bool:
    """Whether every row begins and ends with a word."""
    if rows.element_size() >= _WORD.itemsize or rows.stride(-1) != 1:
        return False
    numbers = _WORD.itemsize // rows.element_size()
    return not any(each % numbers for each in (rows.shape[-1], rows.storage_offset(), *rows.stride()[:-1]))
