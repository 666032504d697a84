"""RMS or pixel norm and SiLU into the window of a convolution, and the sum behind one: a pass over memory each.

The definitions are `ops.rms_norm` and `ops.causal`; these kernels compute in float32 and round once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastvideo_vae_core.ops.rms_norm import EPS, Modulation

# Elements that one program holds.
_TILE = 4096


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

    out: (B, F, H + 2 inset, W + 2 inset, taps * C), dense. Frame t goes to frame t + shift - j, columns
    [j * C, (j + 1) * C), for each tap j whose frame exists.
    eps: under the root of the mean square; without it the norm is that of the length, with its floor.
    modulation: behind the norm, for each item.
    """
    batch, frames, height, width, channels = rows.shape
    positions = height * width
    columns = triton.next_power_of_2(channels)
    block = max(_TILE // columns, 1)
    # Where there is nothing to read, any tensor stands in.
    scale, shifts = (each.contiguous() for each in modulation) if modulation is not None else (out, out)
    rows = rows.contiguous()
    if not out.is_meta:
        _norm_silu_kernel[(triton.cdiv(positions, block), batch * frames)](
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
            channels**0.5,
            C=channels,
            TAPS=taps,
            FLOOR=EPS,
            EPS=0.0 if eps is None else eps,
            PIXEL=eps is not None,
            HAS_BIAS=bias is not None,
            HAS_GAMMA=gamma is not None,
            MODULATED=modulation is not None,
            BLOCK=block,
            COLUMNS=columns,
            num_warps=4,
        )


def add_(rows: Tensor, bias: Tensor, other: Tensor) -> None:
    """rows + bias + other, in the place of dense rows (..., C)."""
    total, block, other = rows.numel(), 2048, other.contiguous()
    if not rows.is_meta:
        _add_kernel[(triton.cdiv(total, block),)](rows, bias, other, total, C=rows.shape[-1], BLOCK=block, num_warps=4)


@triton.jit
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
    root,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    FLOOR: tl.constexpr,
    EPS: tl.constexpr,
    PIXEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    MODULATED: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    frame = tl.program_id(1).to(tl.int64)
    item, t = frame // frames, frame % frames
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    here = (row < positions) & (column < C)
    x = tl.load(x_ptr + (frame * positions + row) * C + column, mask=here, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + column, mask=column < C, other=0.0).to(tl.float32)
    square = tl.sum(x * x, axis=1, keep_dims=True)
    if PIXEL:
        length = tl.sqrt(square / C + EPS)
        y = x / length
    else:
        length = tl.maximum(tl.sqrt(square), FLOOR)
        y = x * (root / length)
    if HAS_GAMMA:
        y = y * tl.load(gamma_ptr + column, mask=column < C, other=0.0).to(tl.float32)
    if MODULATED:
        factor = 1.0 + tl.load(scale_ptr + item * C + column, mask=column < C, other=0.0).to(tl.float32)
        y = y * factor + tl.load(shift_ptr + item * C + column, mask=column < C, other=0.0).to(tl.float32)
    y = (y * tl.sigmoid(y)).to(out_ptr.dtype.element_ty)
    # Without rows and columns around the pictures this is the row itself.
    place = corner + row // width * out_width + row % width
    for tap in tl.static_range(TAPS):
        target = t + shift - tap
        at = ((item * out_frames + target) * out_positions + place) * (TAPS * C) + tap * C + column
        tl.store(out_ptr + at, y, mask=here & (target >= 0) & (target < out_frames))


@triton.jit
def _add_kernel(y_ptr, bias_ptr, x_ptr, total, C: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < total
    y = tl.load(y_ptr + at, mask=here).to(tl.float32)
    y += tl.load(bias_ptr + at % C).to(tl.float32)
    y += tl.load(x_ptr + at, mask=here).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=here)
