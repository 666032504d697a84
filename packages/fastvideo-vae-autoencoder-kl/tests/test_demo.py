"""The miniature that ships with the package: its size, and its quality on the photograph beside it."""

from __future__ import annotations

import pytest

from fastvideo_vae_autoencoder_kl import AutoencoderKL
from fastvideo_vae_autoencoder_kl.family import FAMILY
from fastvideo_vae_core.media.images import read_image
from fastvideo_vae_core.metrics import psnr
from fastvideo_vae_core.testing.miniature import VAE, MiniatureSuite


class TestMiniature(MiniatureSuite):
    family = FAMILY
    model = AutoencoderKL

    def test_the_photograph_comes_back_as_well_as_the_readme_says(self, miniature: VAE) -> None:
        x = read_image(self.example())[None]
        measured = float(psnr(x, miniature(x)))
        assert measured >= 28
        # Levels are rounded for the table.
        assert measured == pytest.approx(self.stated("| astronaut | 512 × 512 |"), abs=0.05)
