"""Convolutions as sums of matrix products, one for each tap: for wide layers in float32 on a GPU.

Without TF32 cuDNN 9.19 computes them at 20 to 30 TFLOP/s of an H100, and takes 33 GiB of workspace for 1024 channels on
small pictures. Products take no workspace, and there is one way for any number of positions at a time, where cuDNN
chooses another algorithm for another one. Where that counts more than speed, they serve layers of any shape.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Fewer channels make products that are too small to be worth their sums.
_NARROWEST = 128


def takes(device: torch.device, x: Tensor, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, *, any_shape: bool = False) -> bool:
    """Whether it is the way for that input on that device, which is another one only in a rehearsal.

    any_shape: also for narrow layers, strides and single taps, where one way for any number of positions counts more
        than speed.
    """
    if device.type != "cuda" or x.dtype != torch.float32 or max(conv.dilation) > 1:
        return False
    narrow = min(conv.in_channels, conv.out_channels) < _NARROWEST
    if not any_shape and (narrow or max(conv.stride) > 1 or math.prod(conv.kernel_size) == 1):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or conv.weight.requires_grad):
        return False
    # With TF32 convolutions have tensor cores, which products by default have not.
    return bool(torch.backends.cudnn.conv.fp32_precision != "tf32")  # type: ignore[attr-defined]


def strided(x: Tensor, weight: Tensor, stride: Sequence[int]) -> Tensor:
    """The convolution of x (B, C, ...), padded before, by weights (O, C, ...) with a stride; dense in the plain layout.

    What a tap sees is copied into one row.
    """
    kernel = weight.shape[2:]
    made = [(size - count) // step + 1 for size, count, step in zip(x.shape[2:], kernel, stride, strict=True)]
    total = x.new_empty(len(x), len(weight), math.prod(made))
    for index, tap in enumerate(itertools.product(*map(range, kernel))):
        seen = (slice(at, at + step * (size - 1) + 1, step) for at, step, size in zip(tap, stride, made, strict=True))
        rows = x[(slice(None), slice(None), *seen)].flatten(2)
        place: tuple[slice | int, ...] = (slice(None), slice(None), *tap)
        total.baddbmm_(weight[place].expand(len(x), -1, -1), rows, beta=min(index, 1))
    return total.unflatten(2, made)


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """The convolution of x (B, C, ...), padded before and in any layout, by weights (O, C, ...); the result has that
    layout, too, with gaps.

    Positions lie in one row, so what a tap sees begins further on in that row. Where a kernel would leave the end of a
    line it sees the next one, and what it makes there is dropped.
    """
    kernel, batch, sizes = weight.shape[2:], len(x), x.shape[2:]
    innermost = x.stride(1) == 1 and x.shape[1] > 1
    flat = (x.movedim(1, -1).contiguous().movedim(-1, 1) if innermost else x.contiguous()).flatten(2)
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    made = [size - count + 1 for size, count in zip(sizes, kernel, strict=True)]
    # From the first position to the last one that counts.
    length = 1 + sum((size - 1) * stride for size, stride in zip(made, strides, strict=True))
    taps = weight.flatten(2).movedim(2, 0).contiguous()
    rows, width = math.prod(sizes), len(weight)
    total = x.new_empty(batch, rows, width).mT if innermost else x.new_empty(batch, width, rows)
    part = total[..., :length]
    for index, tap in enumerate(itertools.product(*map(range, kernel))):
        start = sum(at * stride for at, stride in zip(tap, strides, strict=True))
        part.baddbmm_(taps[index].expand(batch, -1, -1), flat[..., start : start + length], beta=min(index, 1))
    y = total.unflatten(2, sizes)
    return y[(slice(None), slice(None), *map(slice, made))]
