"""RMS norm and SiLU into the window of a causal convolution, and the sum behind one: a pass over memory each.

The definitions are `ops.rms_norm` and `ops.causal`; these kernels compute in float32 and round once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastvideo_vae_core.ops.rms_norm import EPS

# Elements that one program holds.
_TILE = 4096


def norm_silu_into(out: Tensor, rows: Tensor, gamma: Tensor, bias: Tensor | None, *, taps: int, shift: int) -> None:
    """silu(norm(rows + bias)) of frames (B, T, H, W, C), written where a causal convolution reads it.

    out: (B, F, H, W, taps * C), dense. Frame t goes to frame t + shift - j, columns [j * C, (j + 1) * C), for each tap
    j whose frame exists.
    """
    batch, frames, height, width, channels = rows.shape
    positions = height * width
    columns = triton.next_power_of_2(channels)
    block = max(_TILE // columns, 1)
    _norm_silu_kernel[(triton.cdiv(positions, block), batch * frames)](
        rows.contiguous(),
        gamma if bias is None else bias,
        gamma,
        out,
        positions,
        frames,
        out.shape[1],
        shift,
        channels**0.5,
        C=channels,
        TAPS=taps,
        EPSILON=EPS,
        HAS_BIAS=bias is not None,
        BLOCK=block,
        COLUMNS=columns,
        num_warps=4,
    )


def add_(rows: Tensor, bias: Tensor, other: Tensor) -> None:
    """rows + bias + other, in the place of dense rows (..., C)."""
    total, block = rows.numel(), 2048
    _add_kernel[(triton.cdiv(total, block),)](
        rows, bias, other.contiguous(), total, C=rows.shape[-1], BLOCK=block, num_warps=4
    )


@triton.jit
def _norm_silu_kernel(
    x_ptr,
    bias_ptr,
    gamma_ptr,
    out_ptr,
    positions,
    frames,
    out_frames,
    shift,
    scale,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    EPSILON: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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
    gamma = tl.load(gamma_ptr + column, mask=column < C, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1, keep_dims=True)), EPSILON)
    y = x * (scale / length) * gamma
    y = (y * tl.sigmoid(y)).to(out_ptr.dtype.element_ty)
    for tap in tl.static_range(TAPS):
        target = t + shift - tap
        at = ((item * out_frames + target) * positions + row) * (TAPS * C) + tap * C + column
        tl.store(out_ptr + at, y, mask=here & (target < out_frames))


@triton.jit
def _add_kernel(y_ptr, bias_ptr, x_ptr, total, C: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < total
    y = tl.load(y_ptr + at, mask=here).to(tl.float32)
    y += tl.load(bias_ptr + at % C).to(tl.float32)
    y += tl.load(x_ptr + at, mask=here).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=here)
