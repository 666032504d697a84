"""Copies in whole words.

Where one of two tensors has gaps in memory, PyTorch copies number by number; on an H100 it moves 0.4 TB/s of 16-bit
numbers so, and 2.5 TB/s of words (see `ops.nearest`). Where channels lie side by side there are words to copy.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from fastvideo_vae_core.ops.sums import Sum
from fastvideo_vae_core.rehearsal import device_of

_WORD = torch.int64
_TRITON = importlib.util.find_spec("triton") is not None


def copy_rows(into: Tensor, source: Tensor) -> None:
    """Copy rows of channels (..., C) into others of their shape. The same as `into.copy_(source)`."""
    if into.is_meta:
        # No numbers, and no memory beside them.
        return
    differentiates = torch.is_grad_enabled() and source.requires_grad
    if not differentiates and into.dtype == source.dtype and _in_words(into) and _in_words(source):
        into, source = into.view(_WORD), source.view(_WORD)
    into.copy_(source)


def write_rows(into: Tensor, source: Sum) -> bool:
    """Write a sum of rows of channels (..., C) into others of their shape in one pass, if a kernel takes them: in 16
    bits on a GPU, where there is nothing to differentiate."""
    given = [each for each in (source.x, source.branch) if each is not None]
    if not _fuses(into, *source) or any(each.dtype != into.dtype for each in given):
        return False
    # Imported here because Triton takes a second to import and only GPUs need it.
    from fastvideo_vae_core.ops.kernels import rows

    if not rows.takes(into, *given):
        return False
    rows.write(into, source.x, source.bias, source.branch)
    return True


def spread_rows(into: Tensor, rows: Tensor, repeats: Sequence[int], shifts: Sequence[int], bias: Tensor | None) -> bool:
    """What `ops.upsampling.spread` does, in one pass, if a kernel takes it: where `write_rows` would."""
    if not _fuses(into, rows, bias) or len(repeats) > 3 or not (into.is_contiguous() and rows.is_contiguous()):
        return False
    from fastvideo_vae_core.ops.kernels import rows as kernels

    if not kernels.takes(into) or not kernels.takes(rows):
        return False
    kernels.spread(into, rows, repeats, shifts, bias)
    return True


def _fuses(into: Tensor, *given: Tensor | None) -> bool:
    if device_of(into).type != "cuda" or not _TRITON or into.dtype not in (torch.float16, torch.bfloat16):
        return False
    return not (torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in given))


def _in_words(rows: Tensor) -> bool:
    """Whether every row begins and ends with a word."""
    if rows.element_size() >= _WORD.itemsize or rows.stride(-1) != 1:
        return False
    numbers = _WORD.itemsize // rows.element_size()
    return not any(each % numbers for each in (rows.shape[-1], rows.storage_offset(), *rows.stride()[:-1]))
