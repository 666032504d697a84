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

from fastvideo_vae_core.ops.kernels import cdiv, next_power_of_2

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
    columns = next_power_of_2(channels)
    block = max(_TILE // columns, 1)
    sizes = ([1] * 4 + [*out.shape[:-1]])[-4:]
    _write_kernel[(cdiv(rows, block),)](
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


def spread(out: Tensor, rows: Tensor, repeats: Sequence[int], shifts: Sequence[int], bias: Tensor | None) -> None:
    """Write a `folded` convolution's outputs, each into its place, with a bias (O); see `ops.upsampling.spread`.

    out: (B, ..., O); rows: (B, ..., P * O), in which the P ways to choose a phase of each axis lie side by side. Both
    are dense, in words of 16 bytes, and have at most three axes of positions.
    repeats: phases of each axis. shifts: how much later in `rows` the second phase begins.
    """
    if out.is_meta:
        return
    channels = out.shape[-1]
    positions = out.numel() // channels
    columns = next_power_of_2(channels)
    block = max(_TILE // columns, 1)
    short = 3 - len(repeats)
    _spread_kernel[(cdiv(positions, block),)](
        out,
        rows,
        rows if bias is None else bias,
        positions,
        *([1] * 4 + [*out.shape[1:-1]])[-3:],
        *([1] * 4 + [*rows.shape[1:-1]])[-3:],
        *[1] * short,
        *repeats,
        *[0] * short,
        *shifts,
        channels,
        bias is not None,
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


@triton.jit(
    do_not_specialize=[
        *("positions", "out1", "out2", "out3", "size1", "size2", "size3"),
        *("times1", "times2", "times3", "shift1", "shift2", "shift3", "biased"),
    ]
)
def _spread_kernel(
    out,
    rows,
    bias,
    positions,
    out1,
    out2,
    out3,
    size1,
    size2,
    size3,
    times1,
    times2,
    times3,
    shift1,
    shift2,
    shift3,
    channels,
    biased,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A block of positions of `out`. biased: whether there is a bias."""
    column = tl.arange(0, COLUMNS)[None, :]
    known = column < channels
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = (position < positions)[:, None] & known
    at3 = position % out3
    rest = position // out3
    at2 = rest % out2
    rest = rest // out2
    at1 = rest % out1
    item = (rest // out1).to(tl.int64)
    phase = ((at1 % times1) * times2 + at2 % times2) * times3 + at3 % times3
    from1 = at1 // times1 + (at1 % times1) * shift1
    from2 = at2 // times2 + (at2 % times2) * shift2
    from3 = at3 // times3 + (at3 % times3) * shift3
    source = ((item * size1 + from1) * size2 + from2) * size3 + from3
    ways = times1 * times2 * times3
    value = tl.load(rows + ((source * ways + phase) * channels)[:, None] + column, mask=here, other=0.0).to(tl.float32)
    value += tl.load(bias + column, mask=known & (biased != 0), other=0.0).to(tl.float32)
    tl.store(out + position.to(tl.int64)[:, None] * channels + column, value.to(out.dtype.element_ty), mask=here)
