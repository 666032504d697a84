"""The miniature that ships with the package: its size, and its quality on the recording beside it."""

from __future__ import annotations

import pytest

from fastvideo_vae_core.audio_metrics import si_sdr
from fastvideo_vae_core.media.audio import read_audio, resample
from fastvideo_vae_core.testing.miniature import VAE, MiniatureSuite
from fastvideo_vae_oobleck import AutoencoderOobleck
from fastvideo_vae_oobleck.family import FAMILY


class TestMiniature(MiniatureSuite):
    family = FAMILY
    model = AutoencoderOobleck

    def test_the_recording_comes_back_as_well_as_the_readme_says(self, miniature: VAE) -> None:
        waveform, rate = read_audio(self.example())
        waveform = resample(waveform, rate, 22_050)
        x = miniature.pad_to_valid(waveform.expand(2, -1)[None])
        assert float(si_sdr(x, miniature(x))) == pytest.approx(self.stated("| house | 7.1 s |"), abs=0.05)
