"""What holds for the miniature that a family ships, as suites to inherit.

    class TestMiniature(VideoMiniatureSuite):
        family = FAMILY
        model = AutoencoderKLWan
        least_psnr = 26.0

Where a miniature differs on purpose, its family overrides a hook, or the test with a test that says why.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fastvideo_vae_core.family import Family
from fastvideo_vae_core.loading import load_demo
from fastvideo_vae_core.media.video import VideoReader
from fastvideo_vae_core.metrics import psnr
from fastvideo_vae_core.testing.parity import assert_close
from fastvideo_vae_core.testing.threads import single_thread
from fastvideo_vae_core.vae import ParallelTiledVAE

VAE = ParallelTiledVAE[Any]

WEIGHTS = "diffusion_pytorch_model.safetensors"


class MiniatureSuite:
    """Its files, and the model that they make.

    Attributes:
        family: whose it is.
        model: the class that its configuration names.
    """

    family: ClassVar[Family]
    model: ClassVar[type[VAE]]

    @classmethod
    def folder(cls) -> Path:
        """Where weights, configuration and README are."""
        assert cls.family.demo is not None
        return cls.family.resource(cls.family.demo)

    @classmethod
    def example(cls) -> Path:
        """The media file that ships to run it on, in that folder or beside it."""
        assert cls.family.demo_media is not None
        return cls.family.resource(cls.family.demo_media)

    @classmethod
    def load(cls) -> VAE:
        """In float32, as users load it."""
        return load_demo(cls.family.name, dtype=torch.float32)

    @classmethod
    def stated(cls, row: str) -> float:
        """The number behind the cells with which a row of the README's table begins."""
        text = (cls.folder() / "README.md").read_text(encoding="utf-8")
        found = re.search(rf"{re.escape(row)} ([\d.]+) \|", text)
        assert found, f"no row of the README begins with {row!r}"
        return float(found[1])

    @pytest.fixture(autouse=True)
    def _one_thread(self) -> Iterator[None]:
        with single_thread():
            yield

    @pytest.fixture(scope="class")
    @classmethod
    def miniature(cls) -> VAE:
        vae = cls.load()
        assert isinstance(vae, cls.model)
        return vae

    def test_it_is_small(self) -> None:
        sizes = {path.name: path.stat().st_size for path in self.folder().iterdir()}
        example = self.example()
        beside = {example.name} if example.parent == self.folder() else set()
        assert set(sizes) == {"README.md", "config.json", WEIGHTS} | beside
        assert sizes[WEIGHTS] <= 3_000_000
        assert example.stat().st_size <= 300_000


class VideoMiniatureSuite(MiniatureSuite):
    """Its quality on the clip that ships, and what its README says of it.

    Attributes:
        frames: how many of the clip's first frames most tests take.
        least_psnr: what they must come back with; it was not trained on them.
    """

    frames: ClassVar[int] = 9
    least_psnr: ClassVar[float]

    @classmethod
    def read(cls, frames: int) -> Tensor:
        """The first frames (1, 3, T, H, W) of the clip, or all that there are."""
        with VideoReader(cls.example()) as reader:
            return reader.read(frames)[None]

    @pytest.fixture(scope="class")
    @classmethod
    def clip(cls) -> Tensor:
        return cls.read(cls.frames)

    @pytest.fixture(scope="class")
    @classmethod
    def latents(cls, miniature: VAE, clip: Tensor) -> Tensor:
        z: Tensor = miniature.encode(clip).latent_dist.mode()
        return z

    def test_the_clip_comes_back(self, miniature: VAE, clip: Tensor, latents: Tensor) -> None:
        assert float(psnr(clip, miniature.decode(latents).sample)) >= self.least_psnr

    @pytest.mark.slow
    def test_the_readme_states_what_the_files_give(self, miniature: VAE) -> None:
        x = self.read(1 << 10)
        _, _, frames, height, width = x.shape
        stated = self.stated(f"| bunny | {frames} × {width} × {height} |")
        # Levels are rounded for the table.
        assert float(psnr(x, miniature(x))) == pytest.approx(stated, abs=0.05)

    def test_normalised_latents_are_standard(self, miniature: VAE, latents: Tensor) -> None:
        """The means and deviations of the configuration are those of its latents, not the published ones."""
        normal = miniature.normalize_latents(latents)
        assert abs(float(normal.mean())) < 0.3
        assert 0.4 < float(normal.std()) < 1.6

    def test_diffusers_takes_it(self, miniature: VAE, latents: Tensor) -> None:
        diffusers = pytest.importorskip("diffusers", reason="this machine has no diffusers to compare with")
        theirs = getattr(diffusers, self.model.__name__).from_pretrained(self.folder(), torch_dtype=torch.float32)
        z = latents[..., :8, :8]
        with torch.inference_mode():
            expected = theirs.eval().decode(z).sample
        assert_close(miniature.decode(z).sample, expected, 1e-5, "sums of the same numbers in another order")
