"""A video in pieces: how it is cut, and how a causal network runs over the pieces with one cache.

The first frame is a piece of its own, because Wan's networks treat it as a picture; from then on a piece may have any
number of latent frames. The results do not depend on the cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from fastvideo_vae_core.errors import ShapeError
from fastvideo_vae_core.memory import excerpt, standing_for
from fastvideo_vae_core.ops.causal import Cache
from fastvideo_vae_core.units import Units

# From a piece (B, C, T, H, W) and what is remembered of those before it to the piece of the result.
Network = Callable[[Tensor, Cache], Tensor]


def run(
    network: Network,
    x_BCTHW: Tensor,
    *,
    piece: int,
    frames: int,
    cache: Cache,
    memory_format: torch.memory_format = torch.contiguous_format,
    units: Units | None = None,
) -> Tensor:
    """A whole video, `piece` frames at a time behind the first, to a result of `frames` frames.

    cache: a new one. Every piece of the result is written once, into its place, and is a unit.
    """
    units = Units() if units is None else units
    total, done = x_BCTHW.shape[2], 0
    result: Tensor | None = None
    spans = [(0, 1), *((start, min(start + piece, total)) for start in range(1, total, piece))]
    units.begin(len(spans))
    for (start, stop), times in excerpt(spans, lambda span: (span[0] == 0, span[1] - span[0], span[1] == total)):
        if not times:
            continue
        cache.last = stop == total
        with standing_for(times):
            made = network(x_BCTHW[:, :, start:stop], cache)
        cache.first = False
        if result is None:
            shape = (*made.shape[:2], frames, *made.shape[3:])
            result = torch.empty(shape, dtype=made.dtype, device=made.device, memory_format=memory_format)
        result[:, :, done : done + made.shape[2]] = made
        done += made.shape[2]
        del made
        units.done()
    assert result is not None
    return result


def cut(chunks: Iterable[Tensor], *, piece: int, group: int, surplus: bool) -> Iterator[Tensor]:
    """Cut chunks of frames (B, C, T, H, W), of any lengths, into the pieces that a network takes.

    The first frame comes alone; then come multiples of `group` frames, at most `piece`, as soon as they are there.

    Raises:
        ShapeError: frames are left over at the end that fill no group, unless `surplus` frames are to be dropped.
    """
    left: Tensor | None = None
    begun = False
    for chunk in chunks:
        frames = chunk if left is None else torch.cat([left, chunk], dim=2)
        start = 0
        if not begun and frames.shape[2]:
            yield frames[:, :, :1]
            begun, start = True, 1
        while frames.shape[2] - start >= group:
            stop = start + min(piece, (frames.shape[2] - start) // group * group)
            yield frames[:, :, start:stop]
            start = stop
        left = frames[:, :, start:] if start < frames.shape[2] else None
    if left is not None and not surplus:
        over = left.shape[2]
        raise ShapeError(f"a video needs {group}k + 1 frames; {over} are left over, drop them or add {group - over}")
