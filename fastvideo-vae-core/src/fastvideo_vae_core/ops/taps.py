"""Convolutions as sums of matrix products, one for each tap: for wide layers in float32 on a GPU.

Without TF32 cuDNN 9.19 computes them at 20 to 30 TFLOP/s of an H100, copies pictures whose channels lie innermost into
the plain layout and back, and takes 33 GiB of workspace for 8 pictures of 1024 channels and 24 x 40. Products take no
workspace, are a fifth as far from float64, and there is one way for any number of positions at a time, where cuDNN
chooses another algorithm for another one. Where that counts more than speed, they serve layers of any shape.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvideo_vae_core.memory import excerpt, standing_for
from fastvideo_vae_core.rehearsal import device_of

# Fewer channels make products that are too small to be worth their sums: 27 of them, or 9. Of 512 channels a 3 x 3
# convolution of 256 x 256 positions took 11.5 ms by cuDNN, and 7.8; of 256 at 1024 x 1024 41 and 36; of 128 there 7.9
# and 12.0.
_NARROWEST = 128
_NARROWEST_2D = 256
# Fewer multiplications take less time than nine launches, and what cuDNN needs for them is little.
_FEWEST = 1 << 30


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


def conv2d(x: Tensor, layer: nn.Conv2d, bias: Tensor | None, padding: Sequence[int]) -> Tensor:
    """The layer's convolution of x (B, C, H, W), with zeros around it, the faster way; dense, in the layout of x."""
    narrow = min(layer.in_channels, layer.out_channels) < _NARROWEST_2D
    if narrow or not takes(device_of(x), x, layer) or not worth(x, layer.weight):
        return F.conv2d(x, layer.weight, bias, layer.stride, list(padding))
    return in_strips(x, layer.weight, bias, padding)


def worth(x: Tensor, weight: Tensor) -> bool:
    """Whether pictures x (B, C, H, W) are large enough for a launch for each tap."""
    return len(x) * math.prod(x.shape[2:]) * weight.numel() >= _FEWEST


def in_strips(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int]) -> Tensor:
    """The convolution of x (B, C, H, W), with zeros around it, by weights (O, C, ...); dense, in the layout of x.

    One strip of rows after the other is padded and multiplied, so that little memory is taken beside the result.
    """
    (batch, channels, height, width), (outputs, _, *kernel) = x.shape, weight.shape
    down, across = padding
    sizes = height + 2 * down - kernel[0] + 1, width + 2 * across - kernel[1] + 1
    shape = (batch, *sizes, outputs) if _innermost(x) else (batch, outputs, *sizes)
    made, order = x.new_empty(shape), _in_order(weight)
    made = made.movedim(-1, 1) if _innermost(x) else made
    rows = max(_STRIP // ((width + 2 * across) * (channels + outputs) * x.element_size()), 1)
    items = max(rows // (sizes[0] + kernel[0] - 1), 1)
    parts = [(item, top) for item in range(0, batch, items) for top in range(0, sizes[0], rows)]
    for (item, top), times in excerpt(parts, lambda part: (batch - part[0] >= items, sizes[0] - part[1] >= rows)):
        if not times:
            continue
        strip = made[item : item + items, :, top : top + rows]
        first, last = top - down, top + strip.shape[2] - down + kernel[0] - 1
        seen = x[item : item + items, :, max(first, 0) : last]
        seen = F.pad(seen, (across, across, max(-first, 0), max(last - height, 0)))
        with standing_for(times):
            sums = _summed(seen, order, kernel)
        if bias is None:
            strip.copy_(sums)
        else:
            torch.add(sums, bias.view(-1, 1, 1), out=strip)
    return made


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """The convolution of x (B, C, ...), padded before and in any layout, by weights (O, C, ...); the result has that
    layout, too, with gaps."""
    return _summed(x, _in_order(weight), weight.shape[2:])


def _summed(x: Tensor, order: Tensor, kernel: Sequence[int]) -> Tensor:
    """`convolved`, with weights in the order of the taps.

    Positions lie in one row, so what a tap sees begins further on in that row. Where a kernel would leave the end of a
    line it sees the next one, and what it makes there is dropped.
    """
    batch, sizes, innermost = len(x), x.shape[2:], _innermost(x)
    flat = (x.movedim(1, -1).contiguous().movedim(-1, 1) if innermost else x.contiguous()).flatten(2)
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    made = [size - count + 1 for size, count in zip(sizes, kernel, strict=True)]
    # From the first position to the last one that counts.
    length = 1 + sum((size - 1) * stride for size, stride in zip(made, strides, strict=True))
    rows, width = math.prod(sizes), order.shape[1]
    total = x.new_empty(batch, rows, width).mT if innermost else x.new_empty(batch, width, rows)
    part, weights = total[..., :length], order.unbind()
    starts = [sum(map(operator.mul, tap, strides)) for tap in itertools.product(*map(range, kernel))]
    if batch == 1:
        # For small pictures the time of a launch counts, which is less for one product than for a batch of one.
        part, flat = part[0], flat[0]
        for index, start in enumerate(starts):
            part.addmm_(weights[index], flat.narrow(1, start, length), beta=min(index, 1))
    else:
        for index, start in enumerate(starts):
            part.baddbmm_(weights[index].expand(batch, -1, -1), flat.narrow(2, start, length), beta=min(index, 1))
    y = total.unflatten(2, sizes)
    return y[(slice(None), slice(None), *map(slice, made))]


def _in_order(weight: Tensor) -> Tensor:
    """Weights (O, C, ...) as (taps, O, C)."""
    return weight.flatten(2).movedim(2, 0).contiguous()


def _innermost(x: Tensor) -> bool:
    """Whether the channels of a position lie side by side."""
    return x.stride(1) == 1 and x.shape[1] > 1


# Bytes of the inputs and the sums of a strip. Smaller ones would stay in a GPU's cache from one tap to the next, but
# launches take longer than that saves: with 32 MiB 256 channels at 1024 x 1024 took 41 ms, and with 128 MiB 35.
_STRIP = 128 << 20
