"""Group norm and SiLU for channels-last grids on a GPU: one pass for the statistics, one for everything else.

PyTorch's group norm takes channels-last grids at half its speed and leaves SiLU to another pass, which made
channels-last, the layout in which convolutions are fastest, slower than no layout at all. The definition is
`ops.norm.group_norm_act`; these kernels keep float32 from the statistics through SiLU and round once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from fastvideo_vae_core.ops.kernels import cdiv, next_power_of_2
from fastvideo_vae_core.ops.norm import Moments

# Elements that a program writes.
_TILE = 8192
# Elements that a program reads at a time for statistics, and programs an image is cut into: enough to fill any GPU with
# several on each of its processors, few enough that the partial moments stay small.
_READ = 4096
_PROGRAMS = 1024
# Channels of a group, where there are not more, for which one program is compiled; and partial moments at a time.
_WIDEST, _CHUNK = 16, 256


def group_norm_silu(x: Tensor, norm: nn.GroupNorm, silu: bool, bias: Tensor | None = None) -> Tensor:
    """silu(group_norm(x + bias)), or the norm alone. x: (B, C, ...) in channels-last layout, float16, bfloat16 or
    float32. bias: (C), which costs no pass over memory here."""
    rows_BNC = x.movedim(1, -1).reshape(x.shape[0], -1, x.shape[1])
    scale_BC, offset_BC = _affine(rows_BNC, norm, bias)
    return apply_affine(x, scale_BC, offset_BC, silu)


def apply_affine(x: Tensor, scale_BC: Tensor, offset_BC: Tensor, silu: bool) -> Tensor:
    """silu(x * scale + offset) with float32 factors for each item and channel, in x's layout and type."""
    y = torch.empty_like(x)
    batch, channels = x.shape[:2]
    rows = x[0, 0].numel()
    block = _block(channels)
    tile = max(_TILE // block, 1)
    grid = (cdiv(rows, tile), batch)
    if not x.is_meta:
        _affine_silu_kernel[grid](x, y, scale_BC, offset_BC, rows, channels, tile, block, silu, num_warps=8)
    return y


def moments(x: Tensor, groups: int, bias: Tensor | None = None) -> Moments:
    """Moments of x (B, C, ...), in channels-last layout, with a bias (C) added to it; float64 from the sums of a few
    thousand rows on."""
    batch, channels = x.shape[:2]
    found = torch.empty((2, batch, groups), dtype=torch.float64, device=x.device)
    width = channels // groups
    if not x.is_meta:
        rows_BNC = x.movedim(1, -1).reshape(batch, -1, channels)
        partial, share = _partial_moments(rows_BNC)
        _group_kernel[(groups, batch)](
            partial[0],
            partial[1],
            partial if bias is None else bias,
            found[0],
            found[1],
            rows_BNC.shape[1],
            share,
            partial.shape[2],
            channels,
            width,
            bias is not None,
            _width_block(width),
            _CHUNK,
            num_warps=4,
        )
    return Moments(x[0].numel() // groups, found[0], found[1])


def _partial_moments(rows_BNC: Tensor) -> tuple[Tensor, int]:
    """Means and spreads (2, B, P, C) of the channels in each program's share of the rows, and how many rows that is."""
    batch, rows, channels = rows_BNC.shape
    block = _block(channels)
    tile = max(_READ // block, 1)
    share = cdiv(cdiv(rows, min(_PROGRAMS, cdiv(rows, tile))), tile) * tile
    programs = cdiv(rows, share)
    partial = torch.empty((2, batch, programs, channels), dtype=torch.float32, device=rows_BNC.device)
    if not rows_BNC.is_meta:
        _moments_kernel[(programs, batch)](
            rows_BNC, partial[0], partial[1], rows, share, channels, tile, block, num_warps=8
        )
    return partial, share


def _affine(rows_BNC: Tensor, norm: nn.GroupNorm, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The norm as a multiplication and an addition for each item and channel, float32 (B, C) each."""
    batch, rows, channels = rows_BNC.shape
    partial, share = _partial_moments(rows_BNC)
    programs = partial.shape[2]
    affine = torch.empty((2, batch, channels), dtype=torch.float32, device=rows_BNC.device)
    width = channels // norm.num_groups
    if not rows_BNC.is_meta:
        _merge_kernel[(norm.num_groups, batch)](
            partial[0],
            partial[1],
            norm.weight,
            norm.bias,
            norm.bias if bias is None else bias,
            affine[0],
            affine[1],
            rows,
            share,
            programs,
            channels,
            norm.eps,
            width,
            bias is not None,
            _width_block(width),
            _CHUNK,
            num_warps=4,
        )
    return affine[0], affine[1]


def _block(channels: int) -> int:
    return next_power_of_2(channels)


def _width_block(width: int) -> int:
    return max(next_power_of_2(width), _WIDEST)


@triton.jit(do_not_specialize=["rows", "share"])
def _moments_kernel(x, means, spreads, rows, share, channels: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and spread of each channel over this program's share of the rows.

    Each position of a tile has moments of its own (Welford 1962), which are merged at the end: a merge at each tile
    would leave the memory waiting.
    """
    program, item = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = (column < channels)[None, :]
    first = program * share
    number = tl.minimum(rows - first, share)
    base = x + (item.to(tl.int64) * rows + first) * channels
    row = tl.arange(0, TILE)
    at = row[:, None] * channels + column[None, :]
    mean = tl.zeros((TILE, BLOCK), tl.float32)
    spread = tl.zeros((TILE, BLOCK), tl.float32)
    size = 0.0
    for _ in range(number // TILE):
        values = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
        gap = values - mean
        size += 1.0
        mean += gap * (1.0 / size)
        spread += gap * (values - mean)
        base += TILE * channels
    # Of the rows that are left not every position has one.
    more = row < number % TILE
    mask = more[:, None] & inside
    values = tl.load(base + at, mask=mask, other=0.0).to(tl.float32)
    gap = tl.where(mask, values - mean, 0.0)
    mean += gap * (1.0 / (size + 1.0))
    spread += gap * (values - mean)
    sizes = (size + more.to(tl.float32))[:, None]
    merged = tl.sum(mean * sizes, 0) / number.to(tl.float32)
    gap = mean - merged[None, :]
    out = (item * tl.num_programs(0) + program) * channels + column
    tl.store(means + out, merged, mask=column < channels)
    tl.store(spreads + out, tl.sum(spread + gap * gap * sizes, 0), mask=column < channels)


@triton.jit(do_not_specialize=["rows", "share", "programs", "channels", "width", "shifted"])
def _group_kernel(
    means,
    spreads,
    shift,
    group_means,
    group_spreads,
    rows,
    share,
    programs,
    channels,
    width,
    shifted,
    WIDTH_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The moments of a group."""
    mean, spread = _moments_of_group(
        means, spreads, shift, rows, share, programs, channels, width, shifted, WIDTH_BLOCK, CHUNK
    )
    out = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(group_means + out, mean)
    tl.store(group_spreads + out, spread)


@triton.jit(do_not_specialize=["rows", "share", "programs", "channels", "width", "shifted"])
def _merge_kernel(
    means,
    spreads,
    weight,
    bias,
    shift,
    scales,
    offsets,
    rows,
    share,
    programs,
    channels,
    eps,
    width,
    shifted,
    WIDTH_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The norm of a group as scale and offset for each channel."""
    group, item = tl.program_id(0), tl.program_id(1)
    mean, spread = _moments_of_group(
        means, spreads, shift, rows, share, programs, channels, width, shifted, WIDTH_BLOCK, CHUNK
    )
    column = tl.arange(0, WIDTH_BLOCK)
    channel = group * width + column
    inside = column < width
    variance = spread / (rows.to(tl.float64) * width)
    rstd = 1.0 / tl.sqrt(variance + eps)
    scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float64) * rstd
    moved = tl.load(shift + channel, mask=inside & (shifted != 0), other=0.0).to(tl.float64)
    offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float64) + (moved - mean) * scale
    tl.store(scales + item * channels + channel, scale.to(tl.float32), mask=inside)
    tl.store(offsets + item * channels + channel, offset.to(tl.float32), mask=inside)


@triton.jit
def _moments_of_group(
    means,
    spreads,
    shift,
    rows,
    share,
    programs,
    channels,
    width,
    shifted,
    WIDTH_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Mean and spread of this program's group from those of its channels in each share of the rows; of the numbers with
    a shift of each channel added, if they are shifted. In float64, as there are few of them."""
    group, item = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, WIDTH_BLOCK)
    inside = column < width
    channel = group * width + column
    moved = tl.load(shift + channel, mask=inside & (shifted != 0), other=0.0).to(tl.float64)
    sums = tl.zeros((WIDTH_BLOCK,), tl.float64)
    for start in range(0, programs, CHUNK):
        program = start + tl.arange(0, CHUNK)
        mask = (program < programs)[:, None] & inside[None, :]
        at = (item * programs + program)[:, None] * channels + channel[None, :]
        sizes = tl.minimum(rows - program * share, share).to(tl.float64)[:, None]
        values = tl.load(means + at, mask=mask, other=0.0).to(tl.float64)
        sums += tl.sum(values * sizes, 0)
    count = rows.to(tl.float64)
    mean = tl.sum(sums + moved * count, 0) / (count * width)
    spread = tl.zeros((WIDTH_BLOCK,), tl.float64)
    for start in range(0, programs, CHUNK):
        program = start + tl.arange(0, CHUNK)
        mask = (program < programs)[:, None] & inside[None, :]
        at = (item * programs + program)[:, None] * channels + channel[None, :]
        sizes = tl.minimum(rows - program * share, share).to(tl.float64)[:, None]
        gap = tl.load(means + at, mask=mask, other=0.0).to(tl.float64) + moved[None, :] - mean
        inner = tl.load(spreads + at, mask=mask, other=0.0).to(tl.float64)
        spread += tl.sum(tl.where(mask, inner + gap * gap * sizes, 0.0), 0)
    return mean, tl.sum(spread, 0)


@triton.jit(do_not_specialize=["rows"])
def _affine_silu_kernel(
    x, y, scales, offsets, rows, channels: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr
):
    """One row tile of silu(x * scale + offset)."""
    item = tl.program_id(1)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, BLOCK)
    inside = column < channels
    mask = (row < rows)[:, None] & inside[None, :]
    at = item.to(tl.int64) * rows * channels + row.to(tl.int64)[:, None] * channels + column[None, :]
    scale = tl.load(scales + item * channels + column, mask=inside, other=0.0)
    offset = tl.load(offsets + item * channels + column, mask=inside, other=0.0)
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * scale[None, :] + offset[None, :]
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)
