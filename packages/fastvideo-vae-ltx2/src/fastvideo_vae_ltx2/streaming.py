"""A video in pieces: how it is cut, and how a network runs over the pieces with one cache.

The results do not depend on the cuts. A network that sees later frames gives its results late, so pieces of the result
need not be as long as those that went in: at the end of a video comes most of what was held back. So a network is a
row of stages, and each takes what comes in pieces of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvideo_vae_core.errors import ShapeError
from fastvideo_vae_core.memory import standing_for, until_steady
from fastvideo_vae_core.ops.causal import Cache
from fastvideo_vae_core.units import Units

# From a piece (B, C, T, H, W) and what is remembered of those before it to the piece of the result.
Network = Callable[[Tensor, Cache], Tensor]


class Stage(NamedTuple):
    """A part of a network, and how many frames it takes at a time."""

    network: Network
    limit: int


def flow(stages: Sequence[Stage], pieces: Iterable[tuple[Tensor, bool]], cache: Cache) -> Iterator[Tensor]:
    """Run pieces, each with whether it is the last, through the stages; parts of the result as they are made."""
    for stage in stages:
        pieces = _through(stage, pieces, cache)
    return (made for made, _ in pieces if made.shape[2])


def _through(stage: Stage, pieces: Iterable[tuple[Tensor, bool]], cache: Cache) -> Iterator[tuple[Tensor, bool]]:
    for piece, last in pieces:
        parts = piece.split(stage.limit, dim=2)
        for index, part in enumerate(parts):
            ends = last and index == len(parts) - 1
            if part.shape[2] or ends:
                # Stages take turns, so each says anew where the video ends for it.
                cache.last = ends
                yield stage.network(part, cache), ends


def run(
    stages: Sequence[Stage],
    x_BCTHW: Tensor,
    *,
    first: int,
    piece: int,
    frames: int,
    cache: Cache,
    memory_format: torch.memory_format = torch.contiguous_format,
    units: Units | None = None,
) -> Tensor:
    """A whole video, `first` frames and then `piece` frames at a time, to a result of `frames` frames.

    cache: a new one. Every piece of the result is written once, into its place; what comes in one piece is the result.
    A unit is a piece of what goes in.
    """
    units = Units() if units is None else units
    total, done = x_BCTHW.shape[2], 0
    result: Tensor | None = None
    spans = [(0, first), *_spans(first, total, piece)]
    units.begin(len(spans))
    for made in flow(stages, _pieces(x_BCTHW, spans, units, cache), cache):
        if made.shape[2] == frames:
            result = made
            continue
        if result is None:
            shape = (*made.shape[:2], frames, *made.shape[3:])
            result = torch.empty(shape, dtype=made.dtype, device=made.device, memory_format=memory_format)
        result[:, :, done : done + made.shape[2]] = made
        done += made.shape[2]
    assert result is not None
    return result


def _spans(first: int, total: int, piece: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + piece, total)) for start in range(first, total, piece))


def _pieces(
    x_BCTHW: Tensor, spans: Sequence[tuple[int, int]], units: Units, cache: Cache
) -> Iterator[tuple[Tensor, bool]]:
    """The pieces of a video, each with whether it is the last. They are alike once as much is held back as ever.

    Who asks for the next piece is done with the one before.
    """
    end = spans[-1][1]
    for (start, stop), times in until_steady(spans, lambda span: (span[1] - span[0], span[1] == end), cache.state):
        with standing_for(times):
            yield x_BCTHW[:, :, start:stop], stop == end
        units.done()


def cut(chunks: Iterable[Tensor], *, first: int, piece: int, group: int, surplus: bool) -> Iterator[Tensor]:
    """Cut chunks of frames (B, C, T, H, W), of any lengths, into the pieces that a network takes.

    `first` frames come first, and then multiples of `group` frames, at most `piece`, as soon as they are there.

    Raises:
        ShapeError: frames are left over at the end that fill no group, unless `surplus` frames are to be dropped.
    """
    left: Tensor | None = None
    begun = False
    for chunk in chunks:
        frames = chunk if left is None else torch.cat([left, chunk], dim=2)
        start = 0
        if not begun and frames.shape[2] >= first:
            yield frames[:, :, :first]
            begun, start = True, first
        while begun and frames.shape[2] - start >= group:
            stop = start + min(piece, (frames.shape[2] - start) // group * group)
            yield frames[:, :, start:stop]
            start = stop
        left = frames[:, :, start:] if start < frames.shape[2] else None
    if left is not None and not surplus:
        over = left.shape[2]
        raise ShapeError(f"a video needs {group}k + {first} frames; {over} are left over, drop or add some")
