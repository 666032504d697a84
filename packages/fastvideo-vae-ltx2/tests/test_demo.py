"""The video miniature that ships: its size, its quality on the clip beside it, and what its README says."""

from __future__ import annotations

from fastvideo_vae_core.testing.miniature import VideoMiniatureSuite
from fastvideo_vae_ltx2 import AutoencoderKLLTX2Video
from fastvideo_vae_ltx2.family import FAMILY


class TestMiniature(VideoMiniatureSuite):
    family = FAMILY
    model = AutoencoderKLLTX2Video
    # The first frames of the clip are its hardest.
    least_psnr = 24.0
