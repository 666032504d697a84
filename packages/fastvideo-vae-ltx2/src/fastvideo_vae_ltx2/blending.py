"""The overlapping tiles of published results, see `fastvideo_vae_core.blending`; the official ones are weighted.

Source: Lightricks/LTX-2 `ltx_core/tiling.py` and `ltx_core/model/video_vae`; huggingface/diffusers
`autoencoder_kl_ltx2.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastvideo_vae_core.blending import Blend, BlendedTiles
from fastvideo_vae_core.plan import Direction


@dataclass(frozen=True, kw_only=True)
class WeightedBlend(Blend):
    """Tiles that fade into each other from both sides, as the official code blends them. `frames` are those of the
    first tile, of which one latent frame is a single frame; each further one begins a latent frame earlier."""

    def tiles(self, shape: Sequence[int], direction: Direction, time: int, space: int) -> BlendedTiles:
        """The tiles of samples or latents of that shape."""
        settings = [
            (self.frames, self.frames_stride, time, True),
            *[(self.pixels, self.pixels_stride, space, False)] * 2,
        ]
        axes = []
        for length, (size, stride, ratio, timed) in zip(shape[2:], settings, strict=True):
            latents = length if direction == "decode" else (length - timed) // ratio + timed
            size, stride = (latents, latents) if size is None or stride is None else (size // ratio, stride // ratio)
            cuts = _cut(latents, size, stride)
            axes.append(_normalized([_span(direction, cut, latents, size - stride, ratio, timed) for cut in cuts]))
        places = list(itertools.product(*axes))

        def join(made: Iterable[Tensor]) -> Tensor:
            result: Tensor | None = None
            for tile, place in zip(made, places, strict=True):
                if result is None:
                    sizes = [spans[-1].made.stop for spans in axes]
                    result = tile.new_zeros((*tile.shape[:2], *sizes))
                frames, rows, columns = (each.weights.to(tile) for each in place)
                weights = frames[:, None, None] * rows[:, None] * columns
                result[(slice(None), slice(None), *(each.made for each in place))] += tile * weights
            assert result is not None
            return result

        return BlendedTiles([(slice(None), slice(None), *(each.read for each in place)) for place in places], join)


class Span(NamedTuple):
    """A tile along one axis: what it reads, what it makes of that, and the weights of what it makes."""

    read: slice
    made: slice
    weights: Tensor


def _span(direction: Direction, cut: tuple[int, int], latents: int, overlap: int, ratio: int, timed: bool) -> Span:
    start, stop = cut
    left, right = (overlap if start else 0), (overlap if stop < latents else 0)
    if timed and start:
        # One latent frame more, because the first of a tile is a single frame.
        start, left = start - 1, left + 1
    of_latents = slice(start, stop)
    of_samples = slice(start * ratio, 1 + (stop - 1) * ratio if timed else stop * ratio)
    if direction == "encode":
        return Span(of_samples, of_latents, _trapezoid(stop - start, left, right, timed))
    rise = 1 + (left - 1) * ratio if timed and left else left * ratio
    weights = _trapezoid(of_samples.stop - of_samples.start, rise, right * ratio, timed)
    return Span(of_latents, of_samples, weights)


def _cut(length: int, size: int, stride: int) -> list[tuple[int, int]]:
    if length <= size:
        return [(0, length)]
    # The last tile is as long as what is left.
    count = (length - size - 1) // stride + 2
    return [(index * stride, length if index == count - 1 else index * stride + size) for index in range(count)]


def _trapezoid(length: int, fade_in: int, fade_out: int, from_zero: bool) -> Tensor:
    """Weights that rise and fall in even steps; they begin with a zero where the first element counts for nothing."""
    weights = torch.ones(length)
    if fade_in:
        rise = torch.linspace(0, 1, fade_in + (1 if from_zero else 2))[:-1]
        weights[:fade_in] *= rise if from_zero else rise[1:]
    if fade_out:
        weights[length - fade_out :] *= torch.linspace(1, 0, fade_out + 2)[1:-1]
    return weights


def _normalized(spans: list[Span]) -> list[Span]:
    """Weights of which those of all tiles together are one everywhere: tiles form a grid, so that each axis can be
    divided for itself."""
    total = torch.zeros(spans[-1].made.stop)
    for span in spans:
        total[span.made] += span.weights
    total.clamp_(min=1e-8)
    return [span._replace(weights=span.weights / total[span.made]) for span in spans]


# The defaults of the official code: 24 of 80 frames and 64 of 768 pixels overlap.
OFFICIAL = WeightedBlend(name="official", frames=80, frames_stride=56, pixels=768, pixels_stride=704)
# What diffusers does behind `enable_tiling()`, and with frames too, behind `use_framewise_decoding`.
DIFFUSERS = Blend(name="diffusers", pixels=512, pixels_stride=448)
DIFFUSERS_FRAMEWISE = Blend(name="diffusers framewise", frames=16, frames_stride=8, pixels=512, pixels_stride=448)
