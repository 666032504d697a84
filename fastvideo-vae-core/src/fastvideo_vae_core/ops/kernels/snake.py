"""Snake for audio on a GPU: the sum that it is taken of, and Snake itself, in one pass over memory.

The definition is `ops.snake.snake`, which needs five passes. Everything between is float32 and rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from fastvideo_vae_core.ops.sums import Sum

# Elements that a program of Snake holds at a time, and its warps.
_TILE, _WARPS = 8192, 8
_DENSE = torch.contiguous_format
# Samples and input channels of a step that a program of the pointwise convolution holds at a time, by channels.
_POINTWISE = {64: (128, 64), 128: (128, 64), 256: (128, 32)}


def snake_of_sum(x: Sum, alpha: Tensor, beta: Tensor, keep: bool, room: int = 0) -> tuple[Tensor | None, Tensor]:
    """The sum where it is to be kept, and Snake of it, each dense in the layout of x: plain or channels-last.

    The sum takes the place of `x.x` if that is dense.

    room: zeros behind what Snake makes, in the channels-last layout.
    """
    last = x.x.stride(1) == 1
    # In memory: rows of samples with channels beside each other, or rows of channels.
    main, branch = (_rows(each, last) for each in (x.x, x.branch))
    assert main is not None
    assert last or not room
    batch, rows, columns = main.shape
    out = torch.empty((batch, rows + room, columns), dtype=main.dtype, device=main.device)
    if room:
        out[:, rows:].zero_()
    total = out if not keep else (main if main.is_contiguous() else torch.empty_like(main, memory_format=_DENSE))
    # Triton's own functions for this, and for quotients that are rounded up, take as long as a third of a launch.
    block = min(1 << (columns - 1).bit_length(), 128 if last else 1024)
    tile = max(_TILE // block, 1)
    grid = (-(-rows // tile), -(-columns // block), batch)
    if not out.is_meta:
        _snake_kernel[grid](
            main,
            branch if branch is not None else main,
            x.bias if x.bias is not None else alpha,
            alpha,
            beta,
            total,
            out,
            rows,
            rows + room,
            columns,
            main.stride(0),
            main.stride(1),
            branch.stride(0) if branch is not None else 0,
            branch.stride(1) if branch is not None else 0,
            branch is not None,
            x.bias is not None,
            keep,
            LAST=last,
            EXACT=main.dtype == torch.float32,
            TILE=tile,
            BLOCK=block,
            num_warps=_WARPS,
        )
    made = [each.transpose(1, 2) if last else each for each in (total, out)]
    return made[0] if keep else None, made[1]


def snake_pointwise(x: Sum, alpha: Tensor, beta: Tensor, conv: nn.Conv1d, skip: Tensor) -> Tensor:
    """skip + conv(snake(x)) for a convolution of one tap; channels-last, and channels as `takes_pointwise` says."""
    # Of several items, those behind a dilated convolution may have gaps between them.
    rows, skipped = x.x.transpose(1, 2).contiguous(), skip.transpose(1, 2)
    out = torch.empty_like(rows)
    channels, count = rows.shape[2], rows.shape[0] * rows.shape[1]
    tile, step = _POINTWISE[channels]
    assert skipped.is_contiguous()
    if not out.is_meta:
        _pointwise_kernel[(-(-count // tile),)](
            rows,
            skipped,
            conv.weight,
            x.bias if x.bias is not None else alpha,
            alpha,
            beta,
            conv.bias if conv.bias is not None else alpha,
            out,
            count,
            x.bias is not None,
            conv.bias is not None,
            channels,
            tile,
            step,
            num_warps=8,
        )
    return out.transpose(1, 2)


def takes_pointwise(channels: int) -> bool:
    """Whether a program can hold all channels of its rows at once."""
    return channels in _POINTWISE


def _rows(x: Tensor | None, last: bool) -> Tensor | None:
    """The tensor as (B, rows, columns), its columns without gaps in memory."""
    if x is None:
        return None
    rows = x.transpose(1, 2) if last else x
    return rows if rows.stride(2) == 1 else rows.contiguous()


@triton.jit
def _snake(x, alpha, scale, EXACT: tl.constexpr):
    """x + scale * sin(alpha x)^2 in float32."""
    angle = x * alpha
    if EXACT:
        sine = tl.sin(angle)
    else:
        # The square has period pi, which is taken off in three parts whose products with a whole number are exact;
        # what is left is in [-pi/2, pi/2], where these terms of the sine are right to float32.
        turns = tl.floor(angle * 0.3183098861837907 + 0.5)
        rest = angle - turns * 3.140625
        rest = rest - turns * 9.67502593994140625e-4
        rest = rest - turns * 1.509957990978376432e-7
        square = rest * rest
        series = 2.7557319223985893e-6 - square * 2.505210838544172e-8
        series = -1.984126984126984e-4 + square * series
        series = 8.333333333333333e-3 + square * series
        series = -0.16666666666666666 + square * series
        sine = rest + rest * square * series
    return x + scale * sine * sine


# What is asked for comes at run time, because each program takes half a second to compile.
@triton.jit(do_not_specialize=["rows", "out_rows", "branched", "biased", "keep"])
def _snake_kernel(
    main,
    branch,
    bias,
    alphas,
    betas,
    total,
    out,
    rows,
    out_rows,
    columns,
    main_item,
    main_row,
    branch_item,
    branch_row,
    branched,
    biased,
    keep,
    LAST: tl.constexpr,
    EXACT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile: of (samples, channels) where LAST, else of (channels, samples). branched, biased: whether there are a
    branch and a bias; keep: whether the sum is stored, too."""
    item = tl.program_id(2).to(tl.int64)
    row = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (row < rows) & (column < columns)
    if LAST:
        channel = column
        known = column < columns
    else:
        channel = row
        known = row < rows
    alpha = tl.exp(tl.load(alphas + channel, mask=known, other=0.0).to(tl.float32))
    scale = 1.0 / (tl.exp(tl.load(betas + channel, mask=known, other=0.0).to(tl.float32)) + 1e-9)
    value = tl.load(main + item * main_item + row * main_row + column, mask=mask, other=0.0).to(tl.float32)
    wide = tl.load(branch + item * branch_item + row * branch_row + column, mask=mask & (branched != 0), other=0.0)
    value += wide.to(tl.float32)
    value += tl.load(bias + channel, mask=known & (biased != 0), other=0.0).to(tl.float32)
    at = (item * rows + row) * columns + column
    # What is kept is rounded, and Snake is taken of what is kept.
    kept = value.to(total.dtype.element_ty)
    tl.store(total + at, kept, mask=mask & (keep != 0))
    value = tl.where(keep != 0, kept.to(tl.float32), value)
    at = (item * out_rows + row) * columns + column
    tl.store(out + at, _snake(value, alpha, scale, EXACT).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _pointwise_kernel(
    x,
    skip,
    weight,
    bias,
    alphas,
    betas,
    conv_bias,
    out,
    count,
    BIAS: tl.constexpr,
    CONV_BIAS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """A tile of samples with all their channels: skip + W snake(x + bias) + conv_bias."""
    row = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]
    column = tl.arange(0, CHANNELS)
    mask = row < count
    sums = tl.zeros((TILE, CHANNELS), tl.float32)
    for first in range(0, CHANNELS, STEP):
        channel = first + tl.arange(0, STEP)
        alpha = tl.exp(tl.load(alphas + channel).to(tl.float32))
        scale = 1.0 / (tl.exp(tl.load(betas + channel).to(tl.float32)) + 1e-9)
        value = tl.load(x + row * CHANNELS + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        if BIAS:
            value += tl.load(bias + channel).to(tl.float32)[None, :]
        made = _snake(value, alpha[None, :], scale[None, :], False).to(x.dtype.element_ty)
        # W is (out, in), so this reads it transposed.
        taps = tl.load(weight + column[None, :] * CHANNELS + channel[:, None])
        sums = tl.dot(made, taps, sums)
    if CONV_BIAS:
        sums += tl.load(conv_bias + column).to(tl.float32)[None, :]
    at = row * CHANNELS + column[None, :]
    sums += tl.load(skip + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=mask)
