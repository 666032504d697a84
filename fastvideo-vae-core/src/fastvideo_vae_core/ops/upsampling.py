"""Nearest-neighbour upsampling and the convolution behind it as one, which never sees a position twice.

Of three taps over pairs of equal positions two remain, once those that would see the same one are added up; but other
two for the first than for the second of a pair, so that these are convolutions of their own, side by side in the
channels. With two axes doubled it has 4 of 9 multiplications, with three 8 of 27.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvideo_vae_core.ops import taps
from fastvideo_vae_core.ops.nearest import Nearest
from fastvideo_vae_core.ops.sums import Sum
from fastvideo_vae_core.ops.words import copy_rows, spread_rows, write_rows
from fastvideo_vae_core.rehearsal import device_of


def upsampled2d(x: Tensor, conv: nn.Conv2d, nearest: Nearest, inner: Sequence[bool] = (False, False)) -> Tensor:
    """conv(nearest(x)), (B, C, H, W) -> (B, O, 2H, 2W), of a 3 x 3 convolution with padding 1; folded on a GPU where
    channels lie innermost and there is nothing to differentiate, in 16 bits, and in float32 without TF32.

    inner: whether rows, and columns, of x go on beyond what is wanted. What the first and the last become is missing
        there, if it is folded.
    """
    if not _folds(x, conv):
        return conv(nearest(x))
    weight, padding = folded(conv.weight, (2, 2)), [0 if each else 1 for each in inner]
    if x.dtype == torch.float32:
        made = taps.in_strips(x, weight, None, padding)
    else:
        made = F.conv2d(x, weight, None, 1, padding)
    return spread(made.movedim(1, -1), (2, 2), conv.bias).movedim(-1, 1)


def folded(weight: Tensor, repeats: Sequence[int], causal: bool = False) -> Tensor:
    """The weight (O, C, 3, ...) of a convolution of repeated positions, for the positions themselves.

    repeats: 1 or 2 for each axis.
    causal: whether the first position comes once, and no output sees what follows it along the first axis: then the
        second output of a pair comes before the first one of the next.

    Returns (P * O, C, 2 or 3, ...): the outputs for all P ways to be the first or the second, channels innermost in
    memory. Sums are rounded once.
    """
    sums = _sums_of_taps(tuple(repeats), causal, weight.dtype, weight.device)
    outputs, channels = weight.shape[:2]
    taps = [2 if times == 2 else 3 for times in repeats]
    made = (sums @ weight.movedim(1, -1).reshape(outputs, -1, channels)).view(outputs, math.prod(repeats), -1)
    return made.transpose(0, 1).reshape(-1, *taps, channels).movedim(-1, 1)


def spread(rows: Tensor, repeats: Sequence[int], bias: Tensor | None, causal: bool = False) -> Tensor:
    """What a `folded` convolution made, each output in its place, and the bias (O) added.

    rows: (B, ..., P * O), with a position more along each axis that was doubled, but for the first where it is causal.

    Returns rows (B, ..., O).
    """
    # How much later the second of a pair begins.
    shifts = [0 if causal and axis == 0 else times - 1 for axis, times in enumerate(repeats)]
    sizes = [size - shift for size, shift in zip(rows.shape[1:-1], shifts, strict=True)]
    grown = [size * times for size, times in zip(sizes, repeats, strict=True)]
    made = rows.new_empty(rows.shape[0], *grown, rows.shape[-1] // math.prod(repeats))
    _spread_into(made, rows, repeats, shifts, bias)
    return made


def upsampled_frame(window: Tensor, weight: Tensor, repeats: Sequence[int], bias: Tensor | None) -> Tensor:
    """What the last frame of a window (B, C, K, H, W) becomes: `spread` of its `folded` causal convolution, one frame
    after the other, which takes half the memory beside the result. (B, O, T, 2H, 2W) in rows of channels."""
    time, *space = repeats
    shifts = [each - 1 for each in space]
    made: Tensor | None = None
    for index, part in enumerate(weight.chunk(time)):
        rows = F.conv3d(window, part).movedim(1, -1)
        if made is None:
            grown = [(size - by) * each for size, by, each in zip(rows.shape[2:4], shifts, space, strict=True)]
            made = rows.new_empty(len(rows), time, *grown, rows.shape[-1] // math.prod(space))
        _spread_into(made[:, index], rows[:, 0], space, shifts, bias)
        del rows
    assert made is not None
    return made.movedim(-1, 1)


def _spread_into(
    made: Tensor, rows: Tensor, repeats: Sequence[int], shifts: Sequence[int], bias: Tensor | None
) -> None:
    sizes = [size - shift for size, shift in zip(rows.shape[1:-1], shifts, strict=True)]
    sides = rows.unflatten(-1, (*repeats, -1))
    if spread_rows(made, rows, repeats, shifts, bias):
        return
    *outer, inner = repeats
    for phases in itertools.product(*map(range, outer)):
        side, into = sides, made
        for axis, phase in enumerate(phases):
            side = side.narrow(axis + 1, phase * shifts[axis], sizes[axis])
            into = into[(slice(None),) * (axis + 1) + (slice(phase, None, outer[axis]),)]
        side = side[(..., *phases, slice(None), slice(None))]
        # Along the last axis both of a pair at once: from one to the other is a position and an output.
        *strides, across, along, within = side.stride()
        shape = (*side.shape[:-3], sizes[-1], inner, side.shape[-1])
        side = side.as_strided(shape, (*strides, across, along + shifts[-1] * across, within), side.storage_offset())
        _write(into.unflatten(-2, (-1, inner)), side, bias)


def _write(into: Tensor, rows: Tensor, bias: Tensor | None) -> None:
    """into.copy_(rows + bias) for rows of channels."""
    if into.ndim > 5:
        # More axes than a kernel takes.
        for one, other in zip(into, rows, strict=True):
            _write(one, other, bias)
    elif bias is None:
        copy_rows(into, rows)
    elif not write_rows(into, Sum(rows, bias=bias)):
        into.copy_(rows + bias)


def _folds(x: Tensor, conv: nn.Conv2d) -> bool:
    if device_of(x).type != "cuda" or not _TRITON or x.stride(1) != 1:
        return False
    if x.dtype == torch.float32:
        return taps.takes(device_of(x), x, conv, any_shape=True)
    differentiates = torch.is_grad_enabled() and (x.requires_grad or conv.weight.requires_grad)
    return x.dtype in (torch.float16, torch.bfloat16) and not differentiates


@functools.cache
def _sums_of_taps(repeats: tuple[int, ...], causal: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Which taps are added up: (P * taps, 3 ** axes) of ones and zeros."""
    found = torch.ones(1, 1, 1)
    for axis, times in enumerate(repeats):
        # Outputs of a pair, their taps, and the taps that each of these stands for.
        each = torch.eye(3)[None]
        if times == 2:
            first, second = [[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]
            each = torch.tensor([second, first] if causal and axis == 0 else [first, second], dtype=torch.float32)
        found = torch.einsum("abc,def->adbecf", found, each).flatten(4).flatten(2, 3).flatten(0, 1)
    return found.flatten(0, 1).to(device, dtype)


_TRITON = importlib.util.find_spec("triton") is not None
