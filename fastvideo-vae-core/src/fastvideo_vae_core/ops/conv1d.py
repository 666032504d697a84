"""Convolutions over audio (B, C, S), each in the formulation that is fastest where it runs.

In 16 bits on a GPU they are 2-D convolutions of height one over channels-last grids: tensors that are (B, C, S) for
everybody and (B, S, C) in memory. On one H100 a convolution of 128 channels over 2,097,152 samples in float16 ran at
663 TFLOP/s that way, and at 270 as `conv1d`. Everywhere else the plain layout keeps to the reference's order of
operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvideo_vae_core.ops.sums import Sum
from fastvideo_vae_core.rehearsal import device_of


def arrange(x: Tensor) -> Tensor:
    """x (B, C, S) in the memory layout that its convolutions take."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if _channels_last(x) else x.contiguous()


def conv1d(x: Tensor, conv: nn.Conv1d) -> Sum:
    """The convolution of x (B, C, S), which `arrange` or another convolution has laid out."""
    stride, padding, dilation = _numbers(conv)
    if device_of(x).type == "cpu":
        return Sum(F.conv1d(x, conv.weight, conv.bias, stride, padding, dilation))
    # cuDNN would add the bias in a pass of its own, which the next operation saves.
    if not _channels_last(x):
        return Sum(F.conv1d(x, conv.weight, None, stride, padding, dilation), bias=conv.bias)
    y = F.conv2d(x.unsqueeze(2), conv.weight.unsqueeze(2), None, (1, stride), (0, padding), (1, dilation))
    return Sum(y.squeeze(2), bias=conv.bias)


def dilated1d(x: Tensor, conv: nn.Conv1d, samples: int | None = None) -> Sum:
    """The same for a convolution without stride whose padding is some times its dilation, which no kernel has to know.

    samples: how many x has, if what follows them are the zeros of `room`.

    cuDNN's choice among dilated kernels depends on all sizes at once, and some of it leaves the tensor cores: of
    LTX-2's vocoder, whose kernels have 3 to 11 taps, a call took 104 ms on an H100 and 9 in the plain layout; of
    Oobleck, one of 1024 channels at dilation 9 took 243 of the 262 ms of 47.5 s, and another one 250 of the 260 ms of
    24 s.
    """
    if not _folds(x, conv):
        return conv1d(x[:, :, :samples], conv)
    return Sum(_folded(x, conv, samples), bias=conv.bias)


def room(x: Tensor, conv: nn.Conv1d) -> int:
    """How many zeros behind samples like those of x save `dilated1d` a copy of them."""
    return -x.shape[2] % conv.dilation[0] if _folds(x, conv) else 0


def even1d(x: Tensor, conv: nn.Conv1d) -> Sum:
    """The convolution of x, behind whose samples there are zeros, for those that keep the length.

    x: (B, C, S); in 16 bits on a GPU, where S is a multiple of the dilation, it may also be what this or `upsample1d`
    has made, and what it makes is a grid (B, C, H, W): H * W samples that are (B, S, C) in memory. So nothing is spent
    on views, and a launch costs more than the kernels of short sound.
    """
    return Sum(_over_grid(x, conv), bias=conv.bias) if _channels_last(x) else conv1d(x, conv)


def evened(x: Tensor, samples: int, dilations: Iterable[int]) -> int:
    """How many samples, zeros among them, signals like x have to have for `even1d` with all of these dilations."""
    return samples + -samples % math.lcm(*dilations) if _channels_last(x) else samples


def upsample1d(x: Tensor, conv: nn.ConvTranspose1d, samples: int | None = None) -> Sum:
    """The transposed convolution of x (B, C, S): (B, C', (S - 1) stride + kernel - 2 padding).

    samples: how many x has, if zeros follow them; such an x may be a grid, see `even1d`.
    """
    stride, padding, _ = _numbers(conv)
    if _channels_last(x):
        return Sum(_interleaved(x, conv, samples), bias=conv.bias)
    x = x if samples is None else x[:, :, :samples]
    if device_of(x).type == "cpu":
        return Sum(F.conv_transpose1d(x, conv.weight, conv.bias, stride, padding))
    return Sum(F.conv_transpose1d(x, conv.weight, None, stride, padding), bias=conv.bias)


def formulation(device: torch.device, dtype: torch.dtype) -> str:
    """For people: how convolutions and Snake are computed on that device in that type."""
    if _is_channels_last(device, dtype):
        return "convolutions in 2-D over channels-last grids, with biases, residuals and Snake in one pass"
    return "convolutions in 1-D" + (", Snake in one pass" if device.type == "cuda" and dtype != torch.float64 else "")


def _folds(x: Tensor, conv: nn.Conv1d) -> bool:
    return _channels_last(x) and conv.dilation[0] > 1


def _folded(x: Tensor, conv: nn.Conv1d, samples: int | None = None) -> Tensor:
    """The convolution over the grid whose rows are as many samples as the dilation: neighbours in its columns are what
    the taps see, so it is a convolution along them, without dilation. In this layout the grid is the same memory."""
    _, padding, dilation = _numbers(conv)
    if missing := -x.shape[2] % dilation:
        x = F.pad(x.mT, (0, 0, 0, missing)).mT
    made = _over_grid(x, conv).view(x.shape[0], conv.out_channels, -1)
    length = (x.shape[2] - missing if samples is None else samples) + 2 * padding - dilation * (conv.kernel_size[0] - 1)
    return made if made.shape[2] == length else made.narrow(2, 0, length)


def _over_grid(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """The convolution, without its bias, as a grid (B, C, H, dilation), or (B, C, 1, S) where nothing is dilated. x may
    be (B, C, S) or a grid of any width that has as many samples, a multiple of the dilation."""
    _, padding, dilation = _numbers(conv)
    samples, row = x.shape[2:].numel(), x.stride(-1)
    width = samples if dilation == 1 else dilation
    if x.ndim == 3 or x.shape[3] != width:
        # A view would do, but for the strides that it gives to axes of one element PyTorch would take the grid, and
        # below the weight, for one in the plain layout, and copy it into that.
        item = max(x.stride(0), samples * row)
        x = x.as_strided((*x.shape[:2], samples // width, width), (item, x.stride(1), width * row, row))
    if dilation == 1:
        return F.conv2d(x, conv.weight.unsqueeze(2), None, 1, (0, padding))
    weight = conv.weight.as_strided((*conv.weight.shape, 1), (*conv.weight.stride(), conv.weight.stride(2)))
    return F.conv2d(x, weight, None, 1, (padding // dilation, 0))


def _interleaved(x: Tensor, conv: nn.ConvTranspose1d, samples: int | None = None) -> Tensor:
    """The transposed convolution as a convolution whose outputs are `stride` samples each, which lie in order in this
    layout: sample r of block t is the sum over j of tap j * stride + r of input t - j."""
    stride, padding, _ = _numbers(conv)
    kernel = conv.kernel_size[0]
    count = -(-kernel // stride)
    taps = conv.weight.permute(2, 1, 0)
    if kernel % stride:
        taps = F.pad(taps, (0, 0, 0, 0, 0, count * stride - kernel))
    # One copy of the weights in each call: taps come in the order of time, which no view can turn round.
    turned = torch.stack(taps.split(stride)[::-1], 2).view(-1, count, conv.in_channels)
    grid = x.unsqueeze(2) if x.ndim == 3 else x
    blocks = F.conv2d(grid, turned.mT.unsqueeze(2), None, 1, (0, count - 1)).squeeze(2)
    length = ((grid.shape[3] if samples is None else samples) - 1) * stride + kernel - 2 * padding
    return blocks.mT.reshape(x.shape[0], -1, conv.out_channels).mT.narrow(2, padding, length)


def needs(conv: nn.Conv1d | nn.ConvTranspose1d, first: int, last: int) -> tuple[int, int]:
    """The inputs [a, b] that the outputs [first, last] are made from; what lies beyond the signal's ends is padding."""
    stride, padding, dilation = _numbers(conv)
    reach = dilation * (conv.kernel_size[0] - 1)
    if isinstance(conv, nn.ConvTranspose1d):
        return -((reach - first - padding) // stride), (last + padding) // stride
    return first * stride - padding, last * stride - padding + reach


def _numbers(conv: nn.Conv1d | nn.ConvTranspose1d) -> tuple[int, int, int]:
    """Stride, padding and dilation."""
    padding = conv.padding[0]
    assert isinstance(padding, int)
    return conv.stride[0], padding, conv.dilation[0]


def _channels_last(x: Tensor) -> bool:
    return _is_channels_last(device_of(x), x.dtype)


def _is_channels_last(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
