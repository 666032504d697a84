"""The window of a causal convolution, filled from a piece of a clip in one pass over memory: norm, SiLU and borders.

The definition is `ops.clip.Reading.of` behind a padding that repeats the border; the kernel computes in float32 and
rounds once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastvideo_vae_core.ops.causal import Window
from fastvideo_vae_core.ops.kernels import cdiv, next_power_of_2

# Elements that one program holds.
_TILE = 4096


def fill(
    window: Window, rows: Tensor, affine: tuple[Tensor, Tensor] | None, *, lead: int, borders: tuple[int, int]
) -> None:
    """Write silu(rows * scale + offset), or the rows, behind the frames that a window remembers.

    window: of frames with so many more rows and columns at each side as `borders` says, which repeat the nearest one.
    rows: (B, T, H, W, C), dense. affine: scale and offset (B, C), float32.
    lead: how often the first frame comes in front of itself.
    """
    batch, frames, height, width, channels = rows.shape
    out = window.data
    rows_around, columns_around = borders
    positions = (height + 2 * rows_around) * (width + 2 * columns_around)
    # Sizes come at run time, so that few programs have to be compiled: one for each power of two of channels.
    columns = next_power_of_2(channels)
    block = max(_TILE // columns, 1)
    scale, offset = (rows, rows) if affine is None else affine
    if not out.is_meta:
        _fill_kernel[(cdiv(positions, block), batch * (lead + frames))](
            rows,
            scale,
            offset,
            out,
            frames,
            height,
            width,
            out.shape[1],
            window.shift,
            positions,
            window.taps,
            lead,
            rows_around,
            columns_around,
            channels,
            AFFINE=affine is not None,
            BLOCK=block,
            COLUMNS=columns,
            num_warps=4,
        )


@triton.jit(
    do_not_specialize=[
        "frames",
        "height",
        "width",
        "out_frames",
        "shift",
        "positions",
        "slots",
        "lead",
        "above",
        "beside",
    ]
)
def _fill_kernel(
    x_ptr,
    scale_ptr,
    offset_ptr,
    out_ptr,
    frames,
    height,
    width,
    out_frames,
    shift,
    positions,
    slots,
    lead,
    above,
    beside,
    channels,
    AFFINE: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One block of positions of one frame of the window."""
    program = tl.program_id(1).to(tl.int64)
    made = frames + lead
    item, t = program // made, program % made - lead
    across = width + 2 * beside
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, COLUMNS)[None, :]
    here = (position < positions)[:, None] & (column < channels)
    y = tl.minimum(tl.maximum(position // across - above, 0), height - 1)
    x = tl.minimum(tl.maximum(position % across - beside, 0), width - 1)
    source = ((item * frames + tl.maximum(t, 0)) * height + y) * width + x
    value = tl.load(x_ptr + source[:, None] * channels + column, mask=here, other=0.0)
    if AFFINE:
        scale = tl.load(scale_ptr + item * channels + column, mask=column < channels, other=0.0)
        offset = tl.load(offset_ptr + item * channels + column, mask=column < channels, other=0.0)
        wide = value.to(tl.float32) * scale + offset
        value = (wide * tl.sigmoid(wide)).to(out_ptr.dtype.element_ty)
    row = position.to(tl.int64)[:, None]
    for slot in range(slots):
        # e[t + shift] is slot `slot` of that frame.
        target = t + shift - slot
        at = ((item * out_frames + target) * positions + row) * (slots * channels) + slot * channels + column
        tl.store(out_ptr + at, value, mask=here & (target >= 0) & (target < out_frames))
