"""The audio miniature that ships with the package: its size, and its quality on the recording beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastvideo_vae_core as fvae
from fastvideo_vae_core.media.audio import read_audio
from fastvideo_vae_core.testing.parity import assert_close
from fastvideo_vae_core.testing.threads import single_thread
from fastvideo_vae_ltx2 import AutoencoderKLLTX2Audio
from fastvideo_vae_ltx2.family import FAMILY

DEMO = FAMILY.resource("demo/audio_vae")
# Spectrograms are natural logarithms.
DECIBELS = 20 / math.log(10)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with single_thread():
        yield


@pytest.fixture(scope="module")
def miniature() -> AutoencoderKLLTX2Audio:
    vae = fvae.load(DEMO, dtype=torch.float32)
    assert isinstance(vae, AutoencoderKLLTX2Audio)
    return vae


@pytest.fixture(scope="module")
def mel(miniature: AutoencoderKLLTX2Audio) -> Tensor:
    """(1, 2, 4k + 1, 64), of the recording that ships."""
    waveform, rate = read_audio(DEMO / "recording.ogg")
    return miniature.pad_to_valid(miniature.waveform_to_mel(waveform.expand(2, -1)[None], rate))


def test_it_is_small() -> None:
    sizes = {path.name: path.stat().st_size for path in DEMO.iterdir()}
    assert set(sizes) == {"README.md", "recording.ogg", "config.json", "diffusion_pytorch_model.safetensors"}
    assert sizes["diffusion_pytorch_model.safetensors"] <= 3_000_000


def test_the_recording_comes_back(miniature: AutoencoderKLLTX2Audio, mel: Tensor) -> None:
    """A level is 1.2 dB off, where saying the same level everywhere would be 11 dB off."""
    made = miniature.decode(miniature.encode(mel).latent_dist.mode()).sample
    assert float((made - mel).abs().mean()) * DECIBELS < 1.5
    assert float((mel - mel.mean()).abs().mean()) * DECIBELS > 8


def test_diffusers_takes_it(miniature: AutoencoderKLLTX2Audio, mel: Tensor) -> None:
    diffusers = pytest.importorskip("diffusers", reason="this machine has no diffusers to compare with")
    theirs = diffusers.AutoencoderKLLTX2Audio.from_pretrained(DEMO, torch_dtype=torch.float32).eval()
    part = mel[:, :, :101]
    with torch.inference_mode():
        expected = theirs.decode(theirs.encode(part).latent_dist.mode()).sample
    made = miniature.decode(miniature.encode(part).latent_dist.mode()).sample
    assert_close(made, expected, 1e-5, "the same network")
