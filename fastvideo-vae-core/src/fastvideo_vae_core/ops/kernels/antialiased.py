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

from fastvideo_vae_core.ops.kernels.snake import _snake
from fastvideo_vae_core.ops.sums import Sum

# Channels and groups of four samples that a program of Snake holds, plain and channels-last.
_PLAIN, _LAST = (1, 256), (32, 8)
# What is asked of LeakyReLU, as its kernel has it.
_BRANCHED, _BIASED, _KEPT, _MEAN = 1, 2, 4, 8
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
        grid = (-(-extent // (4 * groups)), -(-channels // width), batch)
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


def leaky(
    parts: Sequence[Sum], slope: float, *, mean: bool, keep: bool, samples: int, extent: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Sums that are `alike`, or their mean, where they are to be kept, and LeakyReLU of each, of that extent.

    parts: of so many samples, (B, C, S) or grids (B, C, H, W) as `conv1d.even1d` makes them.

    Sums, or else results, take the places of `x`; where sums are kept of three branches, results take the places of
    these unless all are one. What does not fit there is new, (B, C, extent).
    """
    last = _is_last(parts[0].x)
    mains, branches = [part.x for part in parts], [part.branch for part in parts if part.branch is not None]
    biases = [part.bias for part in parts if part.bias is not None]
    if len(parts) == 1:
        mains, branches = ([_laid_out(each, last) for each in group] for group in (mains, branches))
    places = mains
    if keep:
        places = branches if not mean and len(branches) > 1 and branches[0] is not branches[1] else []
    made = 1 if mean else len(parts)
    if places and _fills(places[0], last, extent):
        outs = places[:made]
    else:
        outs = [_empty(mains[0], last, extent) for _ in range(made)]
    if not outs[0].is_meta:
        _launch_leaky(mains, branches, biases, outs, slope, last, mean, keep, samples, extent)
    return mains[:made] if keep else [], outs


def _launch_leaky(
    mains: list[Tensor],
    branches: list[Tensor],
    biases: list[Tensor],
    outs: list[Tensor],
    slope: float,
    last: bool,
    mean: bool,
    keep: bool,
    samples: int,
    extent: int,
) -> None:
    main, count = mains[0], len(mains)
    # What is not there is not read; a pointer has to be something.
    nothing = [main] * 3
    width, length = _LEAKY_LAST if last else _LEAKY_PLAIN
    batch, channels = main.shape[:2]
    _leaky_kernel[(-(-extent // length), -(-channels // width), batch)](
        *(mains if count == 3 else nothing),
        *(branches if len(branches) == 3 else branches * 3 or nothing),
        *(biases if len(biases) == 3 else biases * 3 or nothing),
        *(outs if len(outs) == 3 else outs * 3),
        slope,
        channels,
        samples,
        extent,
        *_strides(main, last),
        *_strides(branches[0] if branches else main, last),
        (_BRANCHED if branches else 0) | (_BIASED if biases else 0) | (_KEPT if keep else 0) | (_MEAN if mean else 0),
        LAST=last,
        PARTS=count,
        WIDTH=width,
        LENGTH=length,
        num_warps=8,
    )


def alike(parts: Sequence[Sum]) -> bool:
    """Whether `leaky` takes these sums: one, or three that lie alike in memory."""
    if len(parts) == 1:
        return True
    x, branch, bias = first = parts[0]
    if len(parts) != 3 or x.stride(1 if _is_last(x) else -1) != 1:
        return False
    if branch is not None and branch.stride(1 if _is_last(x) else -1) != 1:
        return False
    strides = _strides_of(first)
    return all(_strides_of(part) == strides and (part.bias is None) == (bias is None) for part in parts[1:])


def _strides_of(part: Sum) -> tuple[object, ...]:
    return part.x.stride(), None if part.branch is None else part.branch.stride()


def _fills(x: Tensor, last: bool, extent: int) -> bool:
    """Whether it is dense in its layout with so many samples."""
    batch, channels = x.shape[:2]
    item, row = _strides(x, last)
    return (
        x.numel() == batch * channels * extent
        and (batch == 1 or item == channels * extent)
        and (row == (channels if last else extent) or (extent if last else channels) == 1)
    )


def _is_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.stride(-1) != 1


def _laid_out(x: Tensor, last: bool) -> Tensor:
    """x (B, C, S) with its channels, or else its samples, beside each other."""
    if x.stride(1 if last else 2) == 1:
        return x
    return x.mT.contiguous().mT if last else x.contiguous()


def _empty(x: Tensor, last: bool, samples: int) -> Tensor:
    """A new signal of that length, dense in its layout."""
    batch, channels = x.shape[:2]
    strides = (channels * samples, 1, channels) if last else (channels * samples, samples, 1)
    return torch.empty_strided((batch, channels, samples), strides, dtype=x.dtype, device=x.device)


def _strides(x: Tensor, last: bool) -> tuple[int, int]:
    """Of items, and of samples or channels, whichever lie apart."""
    return x.stride(0), x.stride(-1 if last else 1)


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


@triton.jit(do_not_specialize=["slope", "samples", "extent", "asked"])
def _leaky_kernel(
    main,
    main2,
    main3,
    branch,
    branch2,
    branch3,
    bias,
    bias2,
    bias3,
    out,
    out2,
    out3,
    slope,
    channels,
    samples,
    extent,
    main_item,
    main_row,
    branch_item,
    branch_row,
    asked,
    LAST: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Some samples of some channels, of one sum or of three. asked: whether there are branches and biases, whether the
    sums are kept in place of the first of their terms, and whether it is the mean that is asked for."""
    item = tl.program_id(2).to(tl.int64)
    if LAST:
        channel = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH))[None, :]
        sample = (tl.program_id(0) * LENGTH + tl.arange(0, LENGTH)).to(tl.int64)[:, None]
        at = item * main_item + sample * main_row + channel
        at_branch = item * branch_item + sample * branch_row + channel
        place = (item * extent + sample) * channels + channel
    else:
        channel = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)).to(tl.int64)[:, None]
        sample = (tl.program_id(0) * LENGTH + tl.arange(0, LENGTH))[None, :]
        at = item * main_item + channel * main_row + sample
        at_branch = item * branch_item + channel * branch_row + sample
        place = (item * channels + channel) * extent + sample
    known = channel < channels
    here = known & (sample < samples)
    written = known & (sample < extent)
    branched = (asked & 1) != 0
    biased = (asked & 2) != 0
    keep = (asked & 4) != 0
    x = _part(main, branch, bias, at, at_branch, channel, known, here, branched, biased)
    if PARTS == 3:
        mean = (asked & 8) != 0
        apart = (asked & 8) == 0
        x2 = _part(main2, branch2, bias2, at, at_branch, channel, known, here, branched, biased)
        x3 = _part(main3, branch3, bias3, at, at_branch, channel, known, here, branched, biased)
        _put(main2, out2, x2, at, place, slope, here, here & keep & apart, written & apart)
        _put(main3, out3, x3, at, place, slope, here, here & keep & apart, written & apart)
        x = tl.where(mean, (x + x2 + x3) / 3.0, x)
    _put(main, out, x, at, place, slope, here, here & keep, written)


@triton.jit
def _part(main, branch, bias, at, at_branch, channel, known, here, branched, biased):
    """main + branch + bias in float32."""
    x = tl.load(main + at, mask=here, other=0.0).to(tl.float32)
    x += tl.load(branch + at_branch, mask=here & branched, other=0.0).to(tl.float32)
    return x + tl.load(bias + channel, mask=known & biased, other=0.0).to(tl.float32)


@triton.jit
def _put(main, out, x, at, place, slope, here, kept, written):
    """x, and LeakyReLU of it."""
    tl.store(main + at, x.to(main.dtype.element_ty), mask=kept)
    # Zero stays zero, which is what lies behind the last sample.
    y = tl.where(here, tl.where(x > 0.0, x, x * slope), 0.0)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=written)
