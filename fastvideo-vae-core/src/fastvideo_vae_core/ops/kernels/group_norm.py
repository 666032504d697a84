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

from fastvideo_vae_core.ops.norm import Moments

# Elements that a program holds at a time, and programs an image is cut into: enough to fill any GPU, few enough that
# the partial moments stay small.
_TILE = 8192
_PROGRAMS = 512
# Channels of a group, where there are not more, for which one program is compiled.
_WIDEST = 16


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
    grid = (triton.cdiv(rows, tile), batch)
    if not x.is_meta:
        _affine_silu_kernel[grid](x, y, scale_BC, offset_BC, rows, channels, tile, block, silu, num_warps=8)
    return y


def moments(x: Tensor, groups: int, bias: Tensor | None = None) -> Moments:
    """Moments of x (B, C, ...), in channels-last layout, with a bias (C) added to it; float64 from the sums of a few
    thousand rows on."""
    if x.is_meta:
        mean, spread = x.new_empty(2, x.shape[0], groups, dtype=torch.float64)
        return Moments(x[0].numel() // groups, mean, spread)
    rows_BNC = x.movedim(1, -1).reshape(x.shape[0], -1, x.shape[1])
    partial, share = _partial_moments(rows_BNC)
    means_BPC, spreads_BPC = partial.double()
    rows, programs = rows_BNC.shape[1], means_BPC.shape[1]
    if bias is not None:
        means_BPC = means_BPC + bias.double()
    # Every program has its share, but for the last one.
    sizes_P = torch.full((programs,), float(share), dtype=torch.float64, device=x.device)
    sizes_P[-1:] = rows - share * (programs - 1)
    means_BPGW, spreads_BPGW = (each.unflatten(-1, (groups, -1)) for each in (means_BPC, spreads_BPC))
    weights_P = (sizes_P / rows).view(-1, 1, 1)
    means_BG = (means_BPGW * weights_P).sum(1).mean(-1)
    gaps_BPGW = means_BPGW - means_BG[:, None, :, None]
    spreads_BG = (spreads_BPGW + gaps_BPGW.square() * sizes_P.view(-1, 1, 1)).sum((1, 3))
    return Moments(rows * (x.shape[1] // groups), means_BG, spreads_BG)


def _partial_moments(rows_BNC: Tensor) -> tuple[Tensor, int]:
    """Means and spreads (2, B, P, C) of the channels in each program's share of the rows, and how many rows that is."""
    batch, rows, channels = rows_BNC.shape
    block = _block(channels)
    tile = max(_TILE // block, 1)
    share = triton.cdiv(triton.cdiv(rows, min(_PROGRAMS, triton.cdiv(rows, tile))), tile) * tile
    programs = triton.cdiv(rows, share)
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
            max(int(triton.next_power_of_2(width)), _WIDEST),
            _PROGRAMS,
            num_warps=8,
        )
    return affine[0], affine[1]


def _block(channels: int) -> int:
    return int(triton.next_power_of_2(channels))


@triton.jit(do_not_specialize=["rows", "share"])
def _moments_kernel(x, means, spreads, rows, share, channels: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and spread of each channel over this program's share of the rows, tile by tile (Chan's merge)."""
    program, item = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < channels
    first = program * share
    last = tl.minimum(first + share, rows)
    size = 0.0
    mean = tl.zeros((BLOCK,), tl.float32)
    spread = tl.zeros((BLOCK,), tl.float32)
    base = x + item.to(tl.int64) * rows * channels
    for start in range(first, last, TILE):
        row = start + tl.arange(0, TILE)
        mask = (row < last)[:, None] & inside[None, :]
        at = row.to(tl.int64)[:, None] * channels + column[None, :]
        values = tl.load(base + at, mask=mask, other=0.0).to(tl.float32)
        count = tl.minimum(last - start, TILE).to(tl.float32)
        own_mean = tl.sum(values, 0) / count
        centred = tl.where(mask, values - own_mean[None, :], 0.0)
        own_spread = tl.sum(centred * centred, 0)
        gap = own_mean - mean
        total = size + count
        mean += gap * (count / total)
        spread += own_spread + gap * gap * (size * count / total)
        size = total
    out = (item * tl.num_programs(0) + program) * channels + column
    tl.store(means + out, mean, mask=inside)
    tl.store(spreads + out, spread, mask=inside)


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
    PROGRAMS_BLOCK: tl.constexpr,
):
    """The moments of a group from those of its channels and programs, then the norm as scale and offset; of the numbers
    with a shift of each channel added, if they are shifted."""
    group, item = tl.program_id(0), tl.program_id(1)
    program = tl.arange(0, PROGRAMS_BLOCK)
    column = tl.arange(0, WIDTH_BLOCK)
    mask = (program < programs)[:, None] & (column < width)[None, :]
    at = (item * programs + program)[:, None] * channels + group * width + column[None, :]
    sizes = tl.minimum(rows - program * share, share).to(tl.float32)[:, None]
    channel = group * width + column
    inside = column < width
    moved = tl.load(shift + channel, mask=inside & (shifted != 0), other=0.0).to(tl.float32)
    values = tl.load(means + at, mask=mask, other=0.0) + moved[None, :]
    total = rows.to(tl.float32) * width
    mean = tl.sum(tl.sum(tl.where(mask, values * sizes, 0.0), 1), 0) / total
    gap = values - mean
    inner = tl.load(spreads + at, mask=mask, other=0.0)
    spread = tl.sum(tl.sum(tl.where(mask, inner + gap * gap * sizes, 0.0), 1), 0)
    rstd = 1.0 / tl.sqrt(spread / total + eps)
    scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32) * rstd
    offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32) + (moved - mean) * scale
    tl.store(scales + item * channels + channel, scale, mask=inside)
    tl.store(offsets + item * channels + channel, offset, mask=inside)


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
