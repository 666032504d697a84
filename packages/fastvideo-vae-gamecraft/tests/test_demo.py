"""The miniature that ships with the package: its size, its quality on the clip beside it, and what its README says."""

from __future__ import annotations

from torch import Tensor

from fastvideo_vae_core.testing.miniature import VAE, VideoMiniatureSuite
from fastvideo_vae_gamecraft import AutoencoderKLHunyuanVideo
from fastvideo_vae_gamecraft.family import FAMILY


class TestMiniature(VideoMiniatureSuite):
    family = FAMILY
    model = AutoencoderKLHunyuanVideo
    frames = 5
    least_psnr = 36.0

    def test_normalised_latents_are_standard(self, miniature: VAE, latents: Tensor) -> None:
        """In size: the scale of the configuration is that of its latents, not the published one, and the family shifts
        nothing."""
        normal = miniature.normalize_latents(latents)
        assert 0.4 < float(normal.square().mean().sqrt()) < 1.6
