"""Tiles that overlap and are blended, as diffusers and official code cut large pictures and long videos.

That is another function of the input than the network's own, because norms and attention see single tiles. It is here
for those who must match published results; exact tiles are in `fastvideo_vae_core.tiling`.

Shape legend: B batch, C channels, T frames, H, W; pictures have no T.
Source: huggingface/diffusers, `tiled_encode` and `tiled_decode` of its autoencoders;
Tencent-Hunyuan/Hunyuan-GameCraft-1.0 `hymm_sp/vae/autoencoder_kl_causal_3d.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastvideo_vae_core.errors import ConfigError
from fastvideo_vae_core.plan import Direction


@dataclass(frozen=True, kw_only=True)
class Blend:
    """How samples are cut into overlapping tiles; a plan's label for them. Sizes are of samples, for encoding too.

    Attributes:
        name: whose way of cutting it is.
        frames, frames_stride: longer videos are cut into tiles of `frames` + 1 frames, one every `frames_stride`; None
            does not cut in time.
        pixels, pixels_stride: larger pictures are cut into squares of that side, one every `pixels_stride`; None does
            not cut in space.

    Raises:
        ConfigError: tiles that do not overlap as they must: a stride is at least half of a tile, and at most all of it.
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
            if size is not None and not (size > 0 and size <= 2 * stride <= 2 * size):
                raise ConfigError(
                    f"{axis}_stride must lie between half of {axis}={size} and all of it, so that no more than two"
                    f" tiles overlap; got {stride}"
                )

    def check(self, time: int | None, space: int) -> None:
        """Refuse sizes that are no multiples of the compression ratios, where others return another size.

        time: None for pictures, which have no frames to cut.

        Raises:
            ConfigError: a size or a stride is no multiple, or frames of pictures are to be cut.
        """
        if time is None and self.frames is not None:
            raise ConfigError(f"pictures have no frames; leave out frames={self.frames}")
        for axis, ratio in (("frames", time), ("pixels", space)):
            size, stride = getattr(self, axis), getattr(self, f"{axis}_stride")
            if size is not None and (size % ratio or stride % ratio):
                raise ConfigError(f"{axis}={size} and {axis}_stride={stride} of tiles must be multiples of {ratio}")

    def cut(self, axis: Literal["frames", "pixels"], direction: Direction, ratio: int) -> Cut | None:
        """How the input is cut along an axis, and how what comes of it is put together; None: not at all."""
        size, stride = getattr(self, axis), getattr(self, f"{axis}_stride")
        if size is None:
            return None
        if direction == "encode":
            return Cut(stride, size, (size - stride) // ratio, stride // ratio, size)
        return Cut(stride // ratio, size // ratio, size - stride, stride, size // ratio)

    def __str__(self) -> str:
        frames = "" if self.frames is None else f"{self.frames} frames every {self.frames_stride}"
        pixels = "" if self.pixels is None else f"{self.pixels} pixels every {self.pixels_stride}"
        return f"{self.name}: " + (", ".join(filter(None, (frames, pixels))) or "no cuts")


class Cut(NamedTuple):
    """Tiles along an axis, in elements of the input: where they begin, and how long they are; and in elements of the
    output: how many are blended with the tile before, and how many are kept. What is not longer than `limit` is not
    cut. `grain` neighbours have the same share in a blend."""

    stride: int
    size: int
    blend: int
    keep: int
    limit: int
    grain: int = 1


@dataclass(frozen=True)
class BlendedTiles:
    """The tiles of one call. Each is computed for itself, in any order and anywhere; then they are put together.

    Attributes:
        crops: of the input, one for each tile; `x[crop]` is what its network sees.
        join: from what the network made of the crops, in their order, to the result. It reads them one by one, and
            writes into what it reads.
    """

    crops: Sequence[tuple[slice, ...]]
    join: Callable[[Iterable[Tensor]], Tensor]


def blended_tiles(
    shape: Sequence[int], frames: Cut | None, pixels: Cut | None, drops: Literal["first", "last"] = "first"
) -> BlendedTiles:
    """The tiles of an input (B, C, T, H, W) or (B, C, H, W), and how they are blended one after the other.

    drops: the frame that all results but the first leave out: a tile has one frame more than its size, because a causal
        network takes whatever comes first for a picture.
    """
    height, width = shape[-2:]
    stretches = [slice(None)]
    if frames is not None and shape[2] > frames.limit:
        stretches = [slice(start, start + frames.size + 1) for start in range(0, shape[2], frames.stride)]
    squares = [[(slice(None), slice(None))]]
    if pixels is not None and max(height, width) > pixels.limit:
        tops, lefts = (
            [slice(start, start + pixels.size) for start in range(0, extent, pixels.stride)]
            for extent in (height, width)
        )
        squares = [[(top, left) for left in lefts] for top in tops]
    flat = list(itertools.chain.from_iterable(squares))
    front = [(slice(None), slice(None), stretch) for stretch in stretches] if len(shape) == 5 else [(slice(None),) * 2]

    def join(made: Iterable[Tensor]) -> Tensor:
        made = iter(made)
        pictures = (_squares(made, len(squares), len(squares[0]), pixels) for _ in stretches)
        return next(pictures) if len(stretches) == 1 or frames is None else _stretches(pictures, frames, drops)

    return BlendedTiles([(*stretch, *square) for stretch in front for square in flat], join)


def _stretches(made: Iterable[Tensor], cut: Cut, drops: Literal["first", "last"]) -> Tensor:
    """Tiles in time."""
    kept: list[Tensor] = []
    before: Tensor | None = None
    for tile in made:
        if before is not None:
            tile = tile[:, :, 1:] if drops == "first" else tile[:, :, :-1]
            _fade(before, tile, cut, 2)
        kept.append(tile[:, :, : cut.keep + (1 if before is None else 0)])
        before = tile
    return torch.cat(kept, 2)


def _squares(made: Iterator[Tensor], rows: int, columns: int, cut: Cut | None) -> Tensor:
    """Tiles in space. A tile is blended with the one above and the one at its left, as they are after their own
    blending."""
    if rows == columns == 1 or cut is None:
        return next(made)
    joined: list[Tensor] = []
    above: list[Tensor] = []
    for _ in range(rows):
        row: list[Tensor] = []
        for index in range(columns):
            tile = next(made)
            if above:
                _fade(above[index], tile, cut, -2)
            if row:
                _fade(row[-1], tile, cut, -1)
            row.append(tile)
        joined.append(torch.cat([tile[..., : cut.keep, : cut.keep] for tile in row], -1))
        above = row
    return torch.cat(joined, -2)


def _fade(before: Tensor, tile: Tensor, cut: Cut, axis: int) -> None:
    """Fade from the end of one tile to the beginning of the next, in the place of the next. Its first element becomes
    the other's, as published results have it."""
    extent = min(before.shape[axis], tile.shape[axis], cut.blend)
    if extent == 0:
        return
    end, begin = before.narrow(axis, before.shape[axis] - extent, extent), tile.narrow(axis, 0, extent)
    shape = [1] * tile.ndim
    shape[axis] = extent
    steps = torch.arange(extent, device=tile.device) // cut.grain * cut.grain
    weight = steps.to(tile.dtype).div_(extent).view(shape)
    begin.copy_(end * (1 - weight) + begin * weight)
