"""The audio miniature that ships with the package: its size, and its quality on the recording beside it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastvideo_vae_core as fvae
from fastvideo_vae_core.media.audio import read_audio
from fastvideo_vae_core.testing.miniature import VAE, MiniatureSuite
from fastvideo_vae_core.testing.parity import assert_close
from fastvideo_vae_ltx2 import AutoencoderKLLTX2Audio
from fastvideo_vae_ltx2.family import FAMILY

# Spectrograms are natural logarithms.
DECIBELS = 20 / math.log(10)


class TestMiniature(MiniatureSuite):
    family = FAMILY
    model = AutoencoderKLLTX2Audio

    @classmethod
    def folder(cls) -> Path:
        return FAMILY.resource("demo/audio_vae")

    @classmethod
    def example(cls) -> Path:
        return cls.folder() / "recording.ogg"

    @classmethod
    def load(cls) -> VAE:
        return fvae.load(cls.folder(), dtype=torch.float32)

    @pytest.fixture(scope="class")
    @classmethod
    def mel(cls, miniature: AutoencoderKLLTX2Audio) -> Tensor:
        """(1, 2, 4k + 1, 64), of the recording that ships."""
        waveform, rate = read_audio(cls.example())
        return miniature.pad_to_valid(miniature.waveform_to_mel(waveform.expand(2, -1)[None], rate))

    def test_the_recording_comes_back(self, miniature: AutoencoderKLLTX2Audio, mel: Tensor) -> None:
        """A level is 1.2 dB off, where saying the same level everywhere would be 11 dB off."""
        made = miniature.decode(miniature.encode(mel).latent_dist.mode()).sample
        assert float((made - mel).abs().mean()) * DECIBELS < 1.5
        assert float((mel - mel.mean()).abs().mean()) * DECIBELS > 8

    def test_diffusers_takes_it(self, miniature: AutoencoderKLLTX2Audio, mel: Tensor) -> None:
        diffusers = pytest.importorskip("diffusers", reason="this machine has no diffusers to compare with")
        theirs = diffusers.AutoencoderKLLTX2Audio.from_pretrained(self.folder(), torch_dtype=torch.float32).eval()
        part = mel[:, :, :101]
        with torch.inference_mode():
            expected = theirs.decode(theirs.encode(part).latent_dist.mode()).sample
        made = miniature.decode(miniature.encode(part).latent_dist.mode()).sample
        assert_close(made, expected, 1e-5, "the same network")
