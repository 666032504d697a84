"""What stands between two convolutions of a vocoder on a GPU, in one pass over memory each: sums and activations.

The definitions are in `ops.between`; these kernels compute in float32 and round once. In memory signals are rows of
samples (plain) or rows of channels (channels-last). A result may have an extent of more samples than there are, which
are zero.
"""

# Kernels build tuples whose length only Triton knows, and it takes them in no other way.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvideo_vae_core.ops.conv1d import Sum
from fastvideo_vae_core.ops.kernels.snake import _snake

# Channels and groups of four samples that a program of Snake holds, plain and channels-last.
_PLAIN, _LAST = (1, 256), (32, 8)
# Channels and samples that a program of LeakyReLU holds, plain and channels-last.
_LEAKY_PLAIN, _LEAKY_LAST = (1, 2048), (64, 32)


def antialiased_snake(
    x: Sum, alpha: Tensor, beta: Tensor, up: Tensor, down: Tensor, keep: bool, extent: int
) -> tuple[Tensor | None, Tensor]:
    """The sum where it is to be kept, and Snake of it at twice the rate, (B, C, extent)."""
    last = _is_last(x.x)
    main = _laid_out(x.x, last)
    branch = main if x.branch is None else _laid_out(x.branch, last)
    batch, channels, samples = main.shape
    out = _empty(main, last, extent)
    total = _empty(main, last, samples) if keep else out
    width, groups = _LAST if last else _PLAIN
    if not out.is_meta:
        grid = (triton.cdiv(extent, 4 * groups), triton.cdiv(channels, width), batch)
        _antialiased_kernel[grid](
            main,
            branch,
            alpha if x.bias is None else x.bias,
            alpha,
            beta,
            up,
            down,
            total,
            out,
            channels,
            samples,
            extent,
            *_strides(main, last),
            *_strides(branch, last),
            x.branch is not None,
            x.bias is not None,
            keep,
            LAST=last,
            EXACT=main.dtype == torch.float32,
            WIDTH=width,
            GROUPS=groups,
            num_warps=4,
        )
    return total if keep else None, out


def leaky_of_mean(parts: Sequence[Sum], slope: float, keep: bool, extent: int) -> tuple[Tensor | None, Tensor]:
    """The mean of sums that are `alike` where it is to be kept, and LeakyReLU of it, (B, C, extent).

    The mean, or else the result, takes the place of the first `x` if that is dense and long enough.
    """
    first, second, third = parts if len(parts) == 3 else (parts[0],) * 3
    last = _is_last(first.x)
    main = _laid_out(first.x, last)
    branch = main if first.branch is None else _laid_out(first.branch, last)
    bias = main if first.bias is None else first.bias
    batch, channels, samples = main.shape
    dense = main.mT.is_contiguous() if last else main.is_contiguous()
    out = main if dense and not keep and extent == samples else _empty(main, last, extent)
    total = out if not keep else main if dense else _empty(main, last, samples)
    width, length = _LEAKY_LAST if last else _LEAKY_PLAIN
    if not out.is_meta:
        grid = (triton.cdiv(extent, length), triton.cdiv(channels, width), batch)
        _leaky_kernel[grid](
            main,
            branch,
            bias,
            second.x,
            branch if second.branch is None else second.branch,
            bias if second.bias is None else second.bias,
            third.x,
            branch if third.branch is None else third.branch,
            bias if third.bias is None else third.bias,
            total,
            out,
            slope,
            channels,
            samples,
            extent,
            *_strides(main, last),
            *_strides(branch, last),
            first.branch is not None,
            first.bias is not None,
            keep,
            LAST=last,
            THREE=len(parts) == 3,
            WIDTH=width,
            LENGTH=length,
            num_warps=8,
        )
    return total if keep else None, out


def alike(parts: Sequence[Sum]) -> bool:
    """Whether `leaky_of_mean` takes these sums: one, or three of branches and biases that lie alike in memory."""
    if len(parts) == 1:
        return True
    first = parts[0]
    if len(parts) != 3 or first.branch is None or any(part.bias is None for part in parts):
        return False
    inner = 1 if _is_last(first.x) else 2
    if first.x.stride(inner) != 1 or first.branch.stride(inner) != 1:
        return False
    strides = first.x.stride(), first.branch.stride()
    return all(part.branch is not None and (part.x.stride(), part.branch.stride()) == strides for part in parts)


def _is_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.stride(2) != 1


def _laid_out(x: Tensor, last: bool) -> Tensor:
    """x (B, C, S) with its channels, or else its samples, beside each other."""
    if x.stride(1 if last else 2) == 1:
        return x
    return x.mT.contiguous().mT if last else x.contiguous()


def _empty(x: Tensor, last: bool, samples: int) -> Tensor:
    """A new signal of that length, dense in its layout."""
    batch, channels, _ = x.shape
    strides = (channels * samples, 1, channels) if last else (channels * samples, samples, 1)
    return torch.empty_strided((batch, channels, samples), strides, dtype=x.dtype, device=x.device)


def _strides(x: Tensor, last: bool) -> tuple[int, int]:
    """Of items, and of samples or channels, whichever lie apart."""
    return x.stride(0), x.stride(2 if last else 1)


# What is asked for comes at run time, because each program takes half a second to compile.
@triton.jit(do_not_specialize=["samples", "extent", "branched", "biased", "keep"])
def _antialiased_kernel(
    main,
    branch,
    bias,
    alphas,
    betas,
    ups,
    downs,
    total,
    out,
    channels,
    samples,
    extent,
    main_item,
    main_row,
    branch_item,
    branch_row,
    branched,
    biased,
    keep,
    LAST: tl.constexpr,
    EXACT: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Groups of four samples of some channels. branched, biased: whether there are a branch and a bias; keep: whether
    the sum is stored, too.

    Four outputs see 20 samples of the doubled signal in ten pairs, and these 16 inputs. Each thread makes all of them
    for itself, so that nothing goes through memory and five sines are paid for each output instead of two.
    """
    item = tl.program_id(2).to(tl.int64)
    begin = tl.program_id(0) * (4 * GROUPS)
    if LAST:
        channel = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH))[None, :]
        start = (begin + 4 * tl.arange(0, GROUPS))[:, None]
    else:
        channel = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH))[:, None]
        start = (begin + 4 * tl.arange(0, GROUPS))[None, :]
    known = channel < channels
    alpha = tl.exp(tl.load(alphas + channel, mask=known, other=0.0).to(tl.float32))
    scale = 1.0 / (tl.exp(tl.load(betas + channel, mask=known, other=0.0).to(tl.float32)) + 1e-9)
    shift = tl.load(bias + channel, mask=known & (biased != 0), other=0.0).to(tl.float32)
    main += item * main_item
    branch += item * branch_item
    up, down = (), ()
    for tap in tl.static_range(12):
        up = up + (2.0 * tl.load(ups + tap).to(tl.float32),)
        down = down + (tl.load(downs + tap).to(tl.float32),)
    xs = ()
    for step in tl.static_range(16):
        at = start + (step - 6)
        x = _sum_at(main, branch, main_row, branch_row, channel, at, samples, known, branched, LAST) + shift
        xs = xs + (x,)
    # What stands for all samples before the doubled signal, and behind it.
    head = tl.zeros_like(alpha)
    tail = tl.zeros_like(alpha)
    if (begin < 3) | (begin + 4 * GROUPS + 3 > samples):
        zero = tl.zeros_like(channel)
        for tap in tl.static_range(6):
            early, late = zero + (tap - 3), zero + (samples + tap - 3)
            early = _sum_at(main, branch, main_row, branch_row, channel, early, samples, known, branched, LAST)
            late = _sum_at(main, branch, main_row, branch_row, channel, late, samples, known, branched, LAST)
            head += up[11 - 2 * tap] * (early + shift)
            tail += up[10 - 2 * tap] * (late + shift)
        head = _snake(head, alpha, scale, EXACT)
        tail = _snake(tail, alpha, scale, EXACT)
    ys = (tl.zeros_like(xs[0]), tl.zeros_like(xs[0]), tl.zeros_like(xs[0]), tl.zeros_like(xs[0]))
    for pair in tl.static_range(10):
        for parity in tl.static_range(2):
            # This is sample 2 * start - 6 + 2 * pair + parity of the doubled signal; the first and last count nowhere.
            if 2 * pair + parity > 0 and 2 * pair + parity < 19:
                doubled = tl.zeros_like(xs[0])
                for step in tl.static_range(6):
                    doubled += up[11 - parity - 2 * step] * xs[pair + parity + step]
                curved = _snake(doubled, alpha, scale, EXACT)
                where = start + (pair - 3)
                curved = tl.where(where < 0, head, tl.where(where >= samples, tail, curved))
                made = ()
                for each in tl.static_range(4):
                    # Which tap of output `each` that is.
                    if 2 * (pair - each) + parity >= 1 and 2 * (pair - each) + parity <= 12:
                        made = made + (ys[each] + down[2 * (pair - each) + parity - 1] * curved,)
                    else:
                        made = made + (ys[each],)
                ys = made
    if LAST:
        for each in tl.static_range(4):
            row = start + each
            place_out = (item * extent + row) * channels + channel
            y = tl.where(row < samples, ys[each], 0.0).to(out.dtype.element_ty)
            tl.store(out + place_out, y, mask=known & (row < extent))
            place_total = (item * samples + row) * channels + channel
            kept = xs[6 + each].to(total.dtype.element_ty)
            tl.store(total + place_total, kept, mask=known & (row < samples) & (keep != 0))
    else:
        column = (begin + tl.arange(0, 4 * GROUPS))[None, :]
        y = tl.interleave(tl.interleave(ys[0], ys[2]), tl.interleave(ys[1], ys[3]))
        y = tl.where(column < samples, y, 0.0).to(out.dtype.element_ty)
        tl.store(out + (item * channels + channel) * extent + column, y, mask=known & (column < extent))
        kept = tl.interleave(tl.interleave(xs[6], xs[8]), tl.interleave(xs[7], xs[9])).to(total.dtype.element_ty)
        place = (item * channels + channel) * samples + column
        tl.store(total + place, kept, mask=known & (column < samples) & (keep != 0))


@triton.jit
def _sum_at(main, branch, main_row, branch_row, channel, at, samples, known, branched, LAST: tl.constexpr):
    """main + branch at samples, of which those beyond the ends are the ones at the ends."""
    at = tl.minimum(tl.maximum(at, 0), samples - 1).to(tl.int64)
    if LAST:
        x = tl.load(main + at * main_row + channel, mask=known, other=0.0).to(tl.float32)
        other = tl.load(branch + at * branch_row + channel, mask=known & (branched != 0), other=0.0)
    else:
        row = channel.to(tl.int64)
        x = tl.load(main + row * main_row + at, mask=known, other=0.0).to(tl.float32)
        other = tl.load(branch + row * branch_row + at, mask=known & (branched != 0), other=0.0)
    return x + other.to(tl.float32)


@triton.jit(do_not_specialize=["slope", "samples", "extent", "branched", "biased", "keep"])
def _leaky_kernel(
    main,
    branch,
    bias,
    main2,
    branch2,
    bias2,
    main3,
    branch3,
    bias3,
    total,
    out,
    slope,
    channels,
    samples,
    extent,
    main_item,
    main_row,
    branch_item,
    branch_row,
    branched,
    biased,
    keep,
    LAST: tl.constexpr,
    THREE: tl.constexpr,
    WIDTH: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Some samples of some channels. branched, biased, keep: as above."""
    item = tl.program_id(2).to(tl.int64)
    if LAST:
        channel = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH))[None, :]
        sample = (tl.program_id(0) * LENGTH + tl.arange(0, LENGTH)).to(tl.int64)[:, None]
        at = item * main_item + sample * main_row + channel
        at_branch = item * branch_item + sample * branch_row + channel
        place = (item * extent + sample) * channels + channel
        place_total = (item * samples + sample) * channels + channel
    else:
        channel = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)).to(tl.int64)[:, None]
        sample = (tl.program_id(0) * LENGTH + tl.arange(0, LENGTH))[None, :]
        at = item * main_item + channel * main_row + sample
        at_branch = item * branch_item + channel * branch_row + sample
        place = (item * channels + channel) * extent + sample
        place_total = (item * channels + channel) * samples + sample
    known = channel < channels
    here = known & (sample < samples)
    x = _part(main, branch, bias, at, at_branch, channel, known, here, branched, biased)
    if THREE:
        x += _part(main2, branch2, bias2, at, at_branch, channel, known, here, branched, biased)
        x += _part(main3, branch3, bias3, at, at_branch, channel, known, here, branched, biased)
        x = x / 3.0
    tl.store(total + place_total, x.to(total.dtype.element_ty), mask=here & (keep != 0))
    # Zero stays zero, which is what lies behind the last sample.
    y = tl.where(here, tl.where(x > 0.0, x, x * slope), 0.0)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=known & (sample < extent))


@triton.jit
def _part(main, branch, bias, at, at_branch, channel, known, here, branched, biased):
    """main + branch + bias in float32."""
    x = tl.load(main + at, mask=here, other=0.0).to(tl.float32)
    x += tl.load(branch + at_branch, mask=here & (branched != 0), other=0.0).to(tl.float32)
    return x + tl.load(bias + channel, mask=known & (biased != 0), other=0.0).to(tl.float32)
