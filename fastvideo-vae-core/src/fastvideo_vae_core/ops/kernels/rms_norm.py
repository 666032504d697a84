"""RMS or pixel norm and SiLU into the window of a convolution, and the sum behind one: a pass over memory each.

The definitions are `ops.rms_norm` and `ops.causal`; these kernels compute in float32 and round once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastvideo_vae_core.ops.kernels import cdiv, next_power_of_2
from fastvideo_vae_core.ops.rms_norm import EPS, Modulation

# Elements that one program holds, and channels that one program of the sum holds of its rows.
_TILE, _STRIP = 4096, 64
# Programs are written for a power of two of channels, of which there are few: every one more takes half a second to
# compile. For the same reason everything else comes as a number at run time, and what there is not as no channels.
_NARROWEST = 128


def norm_silu_into(
    out: Tensor,
    rows: Tensor,
    gamma: Tensor | None,
    bias: Tensor | None,
    *,
    taps: int,
    shift: int,
    inset: tuple[int, int] = (0, 0),
    eps: float | None = None,
    modulation: Modulation | None = None,
) -> None:
    """silu(norm(rows + bias)) of frames (B, T, H, W, C), written where a causal convolution reads it.

    out: (B, F, H', W', taps * C), dense. Frame t goes to frame t + shift - j, columns [j * C, (j + 1) * C), for each
    tap j whose frame exists.
    inset: row and column of a picture of `out` where those of `rows` begin.
    eps: under the root of the mean square; without it the norm is that of the length, with its floor.
    modulation: behind the norm, for each item.
    """
    batch, frames, height, width, channels = rows.shape
    positions = height * width
    columns = max(next_power_of_2(channels), _NARROWEST)
    block = max(_TILE // columns, 1)
    # Where there is nothing to read, any tensor stands in, with no channels.
    scale, shifts = (each.contiguous() for each in modulation) if modulation is not None else (out, out)
    rows = rows.contiguous()
    if not out.is_meta:
        _norm_silu_kernel[(cdiv(positions, block), batch * frames)](
            rows,
            out if bias is None else bias,
            out if gamma is None else gamma,
            scale,
            shifts,
            out,
            positions,
            frames,
            out.shape[1],
            shift,
            width,
            out.shape[3],
            out.shape[2] * out.shape[3],
            inset[0] * out.shape[3] + inset[1],
            taps,
            channels,
            0 if bias is None else channels,
            0 if gamma is None else channels,
            0 if modulation is None else channels,
            channels**0.5,
            EPS if eps is None else eps,
            PIXEL=eps is not None,
            BLOCK=block,
            COLUMNS=columns,
            num_warps=4,
        )


def add_(rows: Tensor, bias: Tensor, other: Tensor) -> None:
    """rows + bias + other, in the place of dense rows (..., C)."""
    channels, count, block = rows.shape[-1], rows.numel() // rows.shape[-1], 2048 // _STRIP
    strips = cdiv(channels, _STRIP)
    other = other.contiguous()
    if not rows.is_meta:
        _add_kernel[(strips * cdiv(count, block),)](
            rows, bias, other, count, channels, strips, BLOCK=block, STRIP=_STRIP, num_warps=4
        )


@triton.jit(
    do_not_specialize=[
        "positions",
        "frames",
        "out_frames",
        "shift",
        "width",
        "out_width",
        "out_positions",
        "corner",
        "taps",
        "biased",
        "scaled",
        "modulated",
    ]
)
def _norm_silu_kernel(
    x_ptr,
    bias_ptr,
    gamma_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    positions,
    frames,
    out_frames,
    shift,
    width,
    out_width,
    out_positions,
    corner,
    taps,
    channels,
    biased,
    scaled,
    modulated,
    root,
    eps,
    PIXEL: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A block of positions of one frame. biased, scaled and modulated: how many channels bias, gamma and modulation
    have; none leaves the numbers as they are."""
    frame = tl.program_id(1).to(tl.int64)
    item, t = frame // frames, frame % frames
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    here = (row < positions) & (column < channels)
    x = tl.load(x_ptr + (frame * positions + row) * channels + column, mask=here, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + column, mask=column < biased, other=0.0).to(tl.float32)
    square = tl.sum(x * x, axis=1, keep_dims=True)
    if PIXEL:
        length = tl.sqrt(square / channels + eps)
        y = x / length
    else:
        length = tl.maximum(tl.sqrt(square), eps)
        y = x * (root / length)
    y = y * tl.load(gamma_ptr + column, mask=column < scaled, other=1.0).to(tl.float32)
    factor = 1.0 + tl.load(scale_ptr + item * channels + column, mask=column < modulated, other=0.0).to(tl.float32)
    y = y * factor + tl.load(shift_ptr + item * channels + column, mask=column < modulated, other=0.0).to(tl.float32)
    y = (y * tl.sigmoid(y)).to(out_ptr.dtype.element_ty)
    # Without rows and columns around the pictures this is the row itself.
    place = corner + row // width * out_width + row % width
    for tap in range(taps):
        target = t + shift - tap
        at = ((item * out_frames + target) * out_positions + place) * (taps * channels) + tap * channels + column
        tl.store(out_ptr + at, y, mask=here & (target >= 0) & (target < out_frames))


@triton.jit(do_not_specialize=["count", "strips"])
def _add_kernel(y_ptr, bias_ptr, x_ptr, count, channels, strips, BLOCK: tl.constexpr, STRIP: tl.constexpr):
    """A block of rows, a strip of their channels; the strips of a row come behind each other."""
    program = tl.program_id(0)
    row = (program // strips * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    column = (program % strips * STRIP + tl.arange(0, STRIP))[None, :]
    here = (row < count) & (column < channels)
    at = row * channels + column
    y = tl.load(y_ptr + at, mask=here).to(tl.float32)
    y += tl.load(bias_ptr + column, mask=column < channels).to(tl.float32)
    y += tl.load(x_ptr + at, mask=here).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=here)
