"""Rows of channels from wherever they lie to wherever they go, with what is still to be added to them, in one pass.

A tile is cut out of what its borders spoiled, gets the bias of its convolution and a residual, and goes into its place
in a larger grid: three passes over memory for PyTorch, number by number where there are gaps. The definition is
`out.copy_(x + bias + other)`; the kernel adds in float32 and rounds once.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

# Numbers that a program holds.
_TILE = 4096


def takes(*grids: Tensor) -> bool:
    """Whether these rows (..., C), of one shape and type, are in words of 16 bytes, with whole rows between them."""
    channels = grids[0].shape[-1]
    if channels % (16 // grids[0].element_size()) or grids[0].ndim > 5:
        return False
    for each in grids:
        apart = [stride for stride, size in zip(each.stride()[:-1], each.shape[:-1], strict=True) if size > 1]
        if each.stride(-1) != 1 or any(stride % channels for stride in apart):
            return False
        if not each.is_meta and each.data_ptr() % 16:
            return False
    return True


def write(out: Tensor, x: Tensor, bias: Tensor | None, other: Tensor | None) -> None:
    """Write x + bias + other into `out`: rows (..., C) that `takes` says yes to, with at most four axes of them.

    bias: (C,).
    """
    if out.is_meta:
        return
    channels = out.shape[-1]
    rows = out.numel() // channels
    columns = int(triton.next_power_of_2(channels))
    block = max(_TILE // columns, 1)
    sizes = ([1] * 4 + [*out.shape[:-1]])[-4:]
    _write_kernel[(triton.cdiv(rows, block),)](
        out,
        x,
        x if bias is None else bias,
        x if other is None else other,
        rows,
        *sizes[1:],
        *_strides(out, channels),
        *_strides(x, channels),
        *_strides(x if other is None else other, channels),
        channels,
        bias is not None,
        other is not None,
        BLOCK=block,
        COLUMNS=columns,
        num_warps=8,
    )


def _strides(x: Tensor, channels: int) -> Sequence[int]:
    """In rows, of four axes."""
    return ([0] * 4 + [each // channels for each in x.stride()[:-1]])[-4:]


@triton.jit(
    do_not_specialize=[
        *("rows", "size1", "size2", "size3", "out0", "out1", "out2", "out3", "x0", "x1", "x2", "x3"),
        *("other0", "other1", "other2", "other3", "biased", "branched"),
    ]
)
def _write_kernel(
    out,
    x,
    bias,
    other,
    rows,
    size1,
    size2,
    size3,
    out0,
    out1,
    out2,
    out3,
    x0,
    x1,
    x2,
    x3,
    other0,
    other1,
    other2,
    other3,
    channels,
    biased,
    branched,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A block of rows. biased, branched: whether there are those."""
    column = tl.arange(0, COLUMNS)[None, :]
    known = column < channels
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = (row < rows)[:, None] & known
    at3 = (row % size3).to(tl.int64)
    row = row // size3
    at2 = (row % size2).to(tl.int64)
    row = row // size2
    at1 = (row % size1).to(tl.int64)
    at0 = (row // size1).to(tl.int64)
    source = at0 * x0 + at1 * x1 + at2 * x2 + at3 * x3
    value = tl.load(x + source[:, None] * channels + column, mask=here, other=0.0).to(tl.float32)
    value += tl.load(bias + column, mask=known & (biased != 0), other=0.0).to(tl.float32)
    branch = at0 * other0 + at1 * other1 + at2 * other2 + at3 * other3
    more = tl.load(other + branch[:, None] * channels + column, mask=here & (branched != 0), other=0.0)
    value += more.to(tl.float32)
    target = at0 * out0 + at1 * out1 + at2 * out2 + at3 * out3
    tl.store(out + target[:, None] * channels + column, value.to(out.dtype.element_ty), mask=here)
