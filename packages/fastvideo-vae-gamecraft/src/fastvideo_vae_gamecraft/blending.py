"""Tiles that overlap and are blended, as the official code and diffusers cut large videos.

That is another function of the input than the network's own, because norms and attention see single tiles. It is here
for those who must match published results.

Shape legend: B batch, C channels, T frames, H, W.
Source: Tencent-Hunyuan/Hunyuan-GameCraft-1.0 `hymm_sp/vae/autoencoder_kl_causal_3d.py`; huggingface/diffusers
`autoencoder_kl_hunyuan_video.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastvideo_vae_core.errors import ConfigError
from fastvideo_vae_core.plan import Direction

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Blend:
    """How a video is cut into overlapping tiles; a plan's label for them. Sizes are of samples, for encoding too.

    Attributes:
        name: whose way of cutting it is.
        frames, frames_stride: longer videos are cut into tiles of `frames` + 1 frames, one every `frames_stride`; None
            does not cut in time.
        pixels, pixels_stride: larger pictures are cut into squares of that side, one every `pixels_stride`; None does
            not cut in space.
    """

    name: str
    frames: int | None = None
    frames_stride: int | None = None
    pixels: int | None = None
    pixels_stride: int | None = None

    def __post_init__(self) -> None:
        for axis in ("frames", "pixels"):
            size, stride = getattr(self, axis), getattr(self, f"{axis}_stride")
            if (size is None) != (stride is None):
                raise ConfigError(f"{axis} and {axis}_stride come together; one of them is missing")
            if size is not None and not 0 < size // 2 <= stride <= size:
                raise ConfigError(f"{axis}_stride must lie between half of {axis}={size} and all of it, got {stride}")

    def check(self, time: int, space: int) -> None:
        """Refuse sizes that are no multiples of the compression ratios: the official code returns another size then."""
        for axis, ratio in (("frames", time), ("pixels", space)):
            size, stride = getattr(self, axis), getattr(self, f"{axis}_stride")
            if size is not None and (size % ratio or stride % ratio):
                raise ConfigError(f"{axis}={size} and {axis}_stride={stride} of tiles must be multiples of {ratio}")

    def __str__(self) -> str:
        frames = "" if self.frames is None else f"{self.frames} frames every {self.frames_stride}"
        pixels = "" if self.pixels is None else f"{self.pixels} pixels every {self.pixels_stride}"
        return f"{self.name}: " + (", ".join(filter(None, (frames, pixels))) or "no cuts")


# The defaults of the official code: a quarter of a tile overlaps. Its pipelines always run so.
OFFICIAL = Blend(name="official", frames=64, frames_stride=48, pixels=256, pixels_stride=192)
# What diffusers does when nothing is switched on or off, and what it does behind `enable_tiling()`.
DIFFUSERS_FRAMEWISE = Blend(name="diffusers framewise", frames=16, frames_stride=12)
DIFFUSERS = Blend(name="diffusers", frames=16, frames_stride=12, pixels=256, pixels_stride=192)


class Cut(NamedTuple):
    """Tiles along an axis, in elements of the input: where they begin, and how long they are; and in elements of the
    output: how many are blended with the tile before, and how many are kept."""

    stride: int
    size: int
    blend: int
    keep: int


def run(network: Network, x: Tensor, blend: Blend, direction: Direction, time: int, space: int) -> Tensor:
    """The network on the tiles of x (B, C, T, H, W), put together.

    time, space: compression ratios, of which the sizes of tiles are multiples, see `Blend.check`.
    """
    frames = _cut(blend.frames, blend.frames_stride, direction, time)
    pixels = _cut(blend.pixels, blend.pixels_stride, direction, space)

    def pictures(tile: Tensor) -> Tensor:
        return (
            network(tile) if pixels is None or max(tile.shape[3:]) <= pixels.size else _squares(network, tile, pixels)
        )

    return pictures(x) if frames is None or x.shape[2] <= frames.size else _stretches(pictures, x, frames)


def _cut(size: int | None, stride: int | None, direction: Direction, ratio: int) -> Cut | None:
    if size is None or stride is None:
        return None
    if direction == "encode":
        return Cut(stride, size, (size - stride) // ratio, stride // ratio)
    return Cut(stride // ratio, size // ratio, size - stride, stride)


def _stretches(network: Network, x: Tensor, cut: Cut) -> Tensor:
    """Tiles in time. Each has one frame more than its size, and the first result of all but the first is dropped,
    because a causal network takes whatever comes first for a picture."""
    kept: list[Tensor] = []
    before: Tensor | None = None
    for start in range(0, x.shape[2], cut.stride):
        made = network(x[:, :, start : start + cut.size + 1])
        if before is not None:
            made = made[:, :, 1:]
            _blend(before, made, cut.blend, 2)
        kept.append(made[:, :, : cut.keep + (1 if before is None else 0)])
        before = made
    return torch.cat(kept, 2)


def _squares(network: Network, x: Tensor, cut: Cut) -> Tensor:
    """Tiles in space. A tile is blended with the one above and the one at its left, as they are after their own
    blending."""
    rows: list[Tensor] = []
    above: list[Tensor] = []
    for top in range(0, x.shape[3], cut.stride):
        row: list[Tensor] = []
        for index, left in enumerate(range(0, x.shape[4], cut.stride)):
            made = network(x[:, :, :, top : top + cut.size, left : left + cut.size])
            if above:
                _blend(above[index], made, cut.blend, 3)
            if row:
                _blend(row[-1], made, cut.blend, 4)
            row.append(made)
        rows.append(torch.cat([made[..., : cut.keep, : cut.keep] for made in row], 4))
        above = row
    return torch.cat(rows, 3)


def _blend(before: Tensor, tile: Tensor, extent: int, axis: int) -> None:
    """Fade from the end of one tile to the beginning of the next, in the place of the next. Its first element becomes
    the other's, as published results have it."""
    extent = min(before.shape[axis], tile.shape[axis], extent)
    if extent == 0:
        return
    end, begin = before.narrow(axis, before.shape[axis] - extent, extent), tile.narrow(axis, 0, extent)
    shape = [1] * tile.ndim
    shape[axis] = extent
    weight = torch.arange(extent, dtype=tile.dtype, device=tile.device).div_(extent).view(shape)
    begin.copy_(end * (1 - weight) + begin * weight)
