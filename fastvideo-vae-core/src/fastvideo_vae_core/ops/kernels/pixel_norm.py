"""Pixel norm and SiLU over pictures in the plain layout, into the padded input of a convolution, in one kernel.

The definition is x over the root of its mean square along the channels; everything is float32 and rounded once.
`rms_norm` has the same for channels-last.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastvideo_vae_core.ops.kernels import cdiv

# Positions of a program, and channels that it holds of them at a time.
_POSITIONS, _CHANNELS = 64, 32


def norm_silu_padded(x: Tensor, pads: tuple[int, int, int, int], eps: float) -> Tensor:
    """silu(norm(x)) of x (B, C, H, W) between zeros: left, right, above, below."""
    x = x.contiguous()
    left, right, above, below = pads
    batch, channels, height, width = x.shape
    out = x.new_empty(batch, channels, above + height + below, left + width + right)
    if not out.is_meta:
        positions = out.shape[2] * out.shape[3]
        _padded_kernel[(cdiv(positions, _POSITIONS), batch)](
            x,
            out,
            channels,
            height,
            width,
            positions,
            out.shape[3],
            left,
            above,
            eps,
            POSITIONS=_POSITIONS,
            CHANNELS=_CHANNELS,
            num_warps=4,
        )
    return out


@triton.jit(do_not_specialize=["channels", "height", "width", "positions", "out_width", "left", "above", "eps"])
def _padded_kernel(
    x_ptr,
    out_ptr,
    channels,
    height,
    width,
    positions,
    out_width,
    left,
    above,
    eps,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Some positions of what is made, with all their channels: once for the norm, and again, from the cache."""
    item = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    row = position // out_width - above
    column = position % out_width - left
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    at = (row * width + column)[None, :]
    x_ptr += item * channels * height * width
    out_ptr += item * channels * positions
    square = tl.zeros((POSITIONS,), tl.float32)
    for first in range(0, channels, CHANNELS):
        channel = (first + tl.arange(0, CHANNELS)).to(tl.int64)[:, None]
        here = (channel < channels) & inside[None, :]
        x = tl.load(x_ptr + channel * (height * width) + at, mask=here, other=0.0).to(tl.float32)
        square += tl.sum(x * x, axis=0)
    length = tl.sqrt(square / channels + eps)[None, :]
    for first in range(0, channels, CHANNELS):
        channel = (first + tl.arange(0, CHANNELS)).to(tl.int64)[:, None]
        here = (channel < channels) & inside[None, :]
        x = tl.load(x_ptr + channel * (height * width) + at, mask=here, other=0.0).to(tl.float32)
        y = x / length
        # Zero stays zero, which is what lies around the picture.
        y = y * tl.sigmoid(y)
        made = (channel < channels) & (position < positions)[None, :]
        tl.store(out_ptr + channel * positions + position[None, :], y.to(out_ptr.dtype.element_ty), mask=made)
