"""The miniature that ships with the package: its size, its quality on the clip beside it, and what its README says."""

from __future__ import annotations

from fastvideo_vae_core.testing.miniature import VideoMiniatureSuite
from fastvideo_vae_wan import AutoencoderKLWan
from fastvideo_vae_wan.family import FAMILY


class TestMiniature(VideoMiniatureSuite):
    family = FAMILY
    model = AutoencoderKLWan
    least_psnr = 26.0
