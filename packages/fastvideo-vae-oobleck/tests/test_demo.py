"""The miniature that ships with the package: its size, and its quality on the recording beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

import fastvideo_vae_core as fvae
from fastvideo_vae_core.audio_metrics import si_sdr
from fastvideo_vae_core.media.audio import read_audio, resample
from fastvideo_vae_core.testing.threads import single_thread
from fastvideo_vae_oobleck.family import FAMILY

DEMO = FAMILY.resource("demo")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with single_thread():
        yield


def test_it_is_small() -> None:
    sizes = {path.name: path.stat().st_size for path in DEMO.iterdir()}
    assert set(sizes) == {"README.md", "recording.ogg", "config.json", "diffusion_pytorch_model.safetensors"}
    assert sizes["diffusion_pytorch_model.safetensors"] <= 3_000_000


def test_the_recording_comes_back_as_well_as_the_readme_says() -> None:
    vae = fvae.load_demo("oobleck", dtype=torch.float32)
    waveform, rate = read_audio(DEMO / "recording.ogg")
    waveform = resample(waveform, rate, 22_050)
    x = vae.pad_to_valid(waveform.expand(2, -1)[None])
    stated = re.search(r"\| house \| 7\.1 s \| ([\d.]+) \|", (DEMO / "README.md").read_text(encoding="utf-8"))
    assert stated
    assert float(si_sdr(x, vae(x))) == pytest.approx(float(stated[1]), abs=0.05)
