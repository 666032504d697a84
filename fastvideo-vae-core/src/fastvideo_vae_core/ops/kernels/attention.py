"""Weights of attention from its scores: one pass over memory between two matrix products.

The definition is `ops.attention.in_blocks`; this kernel computes in float32 and rounds once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvideo_vae_core.ops.kernels import next_power_of_2

# Columns that the smallest program holds, and columns for each of its warps.
_NARROWEST, _STRIP = 2048, 1024


def weigh_(
    scores: Tensor,
    keys: int,
    scale: float,
    dtype: torch.dtype,
    tops: Tensor,
    sums: Tensor,
    factors: Tensor,
    first: bool,
) -> Tensor:
    """2^((scores - top) * scale) in 16 bits, in the place of scores in float32 (..., K), dense, K a multiple of 16.

    What comes back has rows twice as long, of which the first half holds the K weights; those from `keys` on are zero.

    tops, sums, factors: (...), see `ops.attention`.
    """
    pitch = scores.shape[-1]
    weights = scores.view(dtype)
    block = max(next_power_of_2(pitch), _NARROWEST)
    if not scores.is_meta:
        _weigh_kernel[(tops.numel(),)](
            scores,
            weights,
            tops,
            sums,
            factors,
            pitch,
            keys,
            scale,
            int(first),
            BLOCK=block,
            num_warps=max(block // _STRIP, 4),
        )
    return weights


@triton.jit(do_not_specialize=["keys", "first"])
def _weigh_kernel(
    scores_ptr, weights_ptr, tops_ptr, sums_ptr, factors_ptr, pitch, keys, scale, first, BLOCK: tl.constexpr
):
    """A row. All of it is read before the largest is known, and so before any of it is overwritten."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    here = column < pitch
    x = tl.load(scores_ptr + row.to(tl.int64) * pitch + column, mask=here, other=0.0)
    # Not in the mask above, whose multiples of 16 let words be read.
    x = tl.where(column < keys, x, float("-inf"))
    before = tl.load(tops_ptr + row, mask=first == 0, other=float("-inf"))
    sum_before = tl.load(sums_ptr + row, mask=first == 0, other=0.0)
    top = tl.maximum(tl.max(x, 0), before)
    y = tl.exp2((x - top) * scale).to(weights_ptr.dtype.element_ty)
    factor = tl.exp2((before - top) * scale)
    tl.store(weights_ptr + row.to(tl.int64) * (2 * pitch) + column, y, mask=here)
    tl.store(tops_ptr + row, top)
    tl.store(sums_ptr + row, sum_before * factor + tl.sum(y.to(tl.float32), 0))
    tl.store(factors_ptr + row, factor)
