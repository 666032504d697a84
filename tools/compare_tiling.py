"""How far tiles are from the whole, exact and blended, for a family's trained miniature on a photograph or a clip.

    python tools/compare_tiling.py                                  # autoencoder_kl, on the photographs
    python tools/compare_tiling.py --family wan --readme README.md  # and put the table into a file

PSNR of a round trip in tiles against the round trip at once, in float32: the same weights and the same picture, so that
what is left is what tiling does. Exact tiles have the size of the blended ones.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastvideo_vae_core as fvae
from fastvideo_vae_core.blending import Blend
from fastvideo_vae_core.plan import Direction, Plan

# Sides of a tile. diffusers' own for pictures is 512 or 1024, and cuts nothing smaller; for video it is 256.
TILES = (256,)
# Of a tile overlap a quarter, as diffusers has it by default.
STRIDE = 0.75
HEAD = "| input | tiles | exact, PSNR in dB | largest difference | blended, PSNR in dB | largest difference |"
RULE = "|---|---|---:|---:|---:|---:|"


@dataclass(frozen=True)
class Input:
    """What goes through: a name for people, and samples in [-1, 1]."""

    name: str
    x: Tensor


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and put it into a file if one is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", default="autoencoder_kl", help="a family that ships trained weights")
    parser.add_argument("--weights", help="another checkpoint of the family, instead of those that ship")
    parser.add_argument("--input", type=Path, action="append", help="other pictures or clips; may be repeated")
    parser.add_argument("--frames", type=int, default=17, help="of a clip, from its beginning")
    parser.add_argument("--tiles", type=int, nargs="+", default=TILES, help="sides of tiles, in pixels")
    parser.add_argument("--readme", type=Path, help="a file that has the table between two comments")
    options = parser.parse_args(arguments)
    vae = fvae.load(options.weights, family=options.family) if options.weights else fvae.load_demo(options.family)
    vae = vae.eval().requires_grad_(False).float()
    lines = [HEAD, RULE]
    for each in inputs(options, len(vae.sample_axes)):
        lines += rows(vae, each, options.tiles)
    print("\n".join(lines))
    if options.readme is not None:
        replace_between(options.readme, options.family, "\n".join(lines))


def inputs(options: argparse.Namespace, axes: int) -> Iterator[Input]:
    """What the options name; or what ships with the family, and for pictures others that no training has seen."""
    shipped = fvae.resolve(options.family)
    paths = options.input or [shipped.resource(str(shipped.demo_media))]
    for path in paths:
        name = path.name if options.input else f"the {'photograph' if axes == 2 else 'clip'} that ships"
        yield Input(name, read_picture(path) if axes == 2 else read_clip(path, options.frames))
    if not options.input and axes == 2:
        from skimage import data

        for name in ("coffee", "chelsea"):
            picture = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None]
            yield Input(f"{name} of scikit-image", picture / 127.5 - 1)


def read_picture(path: Path) -> Tensor:
    """(1, 3, H, W)."""
    from fastvideo_vae_core.media.images import read_image

    return read_image(path)[None]


def read_clip(path: Path, frames: int) -> Tensor:
    """(1, 3, T, H, W)."""
    from fastvideo_vae_core.media.video import VideoReader

    with VideoReader(path) as reader:
        return reader.read(frames)[None]


def rows(vae: Any, given: Input, tiles: Sequence[int]) -> Iterator[str]:
    """A line of the table for each size of tiles that cuts the input."""
    x = crop(vae, given.x)
    whole = round_trip(vae, x, {}, {})
    sizes = " x ".join(map(str, x.shape[2:]))
    for side in tiles:
        if max(x.shape[-2:]) <= side:
            continue
        blend = Blend(name="diffusers", pixels=side, pixels_stride=int(side * STRIDE))
        exact = round_trip(vae, x, {"tile": tile(vae, x, side)}, {"tile": tile(vae, x, side)})
        blended = round_trip(vae, x, {"blend": blend}, {"blend": blend})
        cells = [f"{given.name}, {sizes}", f"{side}", *told(exact, whole), *told(blended, whole)]
        yield f"| {' | '.join(cells)} |"


def crop(vae: Any, x: Tensor) -> Tensor:
    """The largest legal part, from the first element on."""
    sizes = (
        (size + axis.lead) // axis.up * axis.up - axis.lead
        for size, axis in zip(x.shape[2:], vae.sample_axes, strict=True)
    )
    return x[(slice(None), slice(None), *(slice(size) for size in sizes))].float()


def tile(vae: Any, x: Tensor, side: int) -> tuple[int, ...]:
    """Exact tiles of that side, through the whole time."""
    return (*x.shape[2:-2], side, side)


def round_trip(vae: Any, x: Tensor, encode: dict[str, Any], decode: dict[str, Any]) -> Tensor:
    """Through the mode of the posterior and back, both by plans with these options."""
    z = vae.encode(x, plan=plan(vae, "encode", x, encode)).latent_dist.mode()
    sample: Tensor = vae.decode(z, plan=plan(vae, "decode", z, decode)).sample
    return sample


def plan(vae: Any, direction: Direction, x: Tensor, options: dict[str, Any]) -> Plan:
    make = vae.plan_encode if direction == "encode" else vae.plan_decode
    made: Plan = make(tuple(x.shape), **options)
    return made


def told(made: Tensor, whole: Tensor) -> tuple[str, str]:
    """PSNR, of samples between -1 and 1, and the largest difference."""
    error = float(F.mse_loss(made.double(), whole.double()))
    psnr = "same bits" if error == 0 else f"{10 * math.log10(4 / error):.1f}"
    return psnr, f"{float((made - whole).abs().max()):.2g}"


def replace_between(path: Path, family: str, table: str) -> None:
    """Put the table between `<!-- tiling: FAMILY -->` and `<!-- end -->`."""
    pattern = rf"(<!-- tiling: {re.escape(family)} -->\n).*?(\n?<!-- end -->)"
    text, count = re.subn(pattern, lambda found: f"{found[1]}{table}\n<!-- end -->", path.read_text(), flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{path} has no place for the table: write <!-- tiling: {family} --> and <!-- end --> there")
    path.write_text(text)


if __name__ == "__main__":
    main()
