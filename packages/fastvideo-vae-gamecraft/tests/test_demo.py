"""The miniature that ships with the package: its size, its quality on the clip beside it, and what its README says."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastvideo_vae_core as fvae
from fastvideo_vae_core.media.video import VideoReader
from fastvideo_vae_core.metrics import psnr
from fastvideo_vae_core.testing.parity import assert_close
from fastvideo_vae_core.testing.threads import single_thread
from fastvideo_vae_gamecraft import AutoencoderKLHunyuanVideo
from fastvideo_vae_gamecraft.family import FAMILY

DEMO = FAMILY.resource("demo")
# What the miniature must give on a clip that it was not trained on.
LEAST_PSNR = 36.0


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with single_thread():
        yield


@pytest.fixture(scope="module")
def miniature() -> AutoencoderKLHunyuanVideo:
    vae = fvae.load_demo("gamecraft", dtype=torch.float32)
    assert isinstance(vae, AutoencoderKLHunyuanVideo)
    return vae


@pytest.fixture(scope="module")
def clip() -> Tensor:
    """The first 5 frames (1, 3, 5, 176, 320)."""
    with VideoReader(FAMILY.resource("demo/clip.mp4")) as reader:
        return reader.read(5)[None]


@pytest.fixture(scope="module")
def latents(miniature: AutoencoderKLHunyuanVideo, clip: Tensor) -> Tensor:
    return miniature.encode(clip).latent_dist.mode()


def test_it_is_small() -> None:
    sizes = {path.name: path.stat().st_size for path in DEMO.iterdir()}
    assert set(sizes) == {"README.md", "clip.mp4", "config.json", "diffusion_pytorch_model.safetensors"}
    assert sizes["diffusion_pytorch_model.safetensors"] <= 3_000_000
    assert sizes["clip.mp4"] <= 300_000


def test_the_clip_comes_back(miniature: AutoencoderKLHunyuanVideo, clip: Tensor, latents: Tensor) -> None:
    assert float(psnr(clip, miniature.decode(latents).sample)) >= LEAST_PSNR


@pytest.mark.slow
def test_the_readme_states_what_the_files_give(miniature: AutoencoderKLHunyuanVideo) -> None:
    with VideoReader(FAMILY.resource("demo/clip.mp4")) as reader:
        x = reader.read(1 << 10)[None]
    _, _, frames, height, width = x.shape
    row = rf"\| bunny \| {frames} × {width} × {height} \| ([\d.]+) \|"
    stated = re.search(row, (DEMO / "README.md").read_text(encoding="utf-8"))
    assert stated
    # Levels are rounded for the table.
    assert float(psnr(x, miniature(x))) == pytest.approx(float(stated[1]), abs=0.05)


def test_normalised_latents_have_a_size_of_one(miniature: AutoencoderKLHunyuanVideo, latents: Tensor) -> None:
    """The scale of the configuration is that of its latents, not the published one; the family shifts nothing."""
    normal = miniature.normalize_latents(latents)
    assert 0.4 < float(normal.square().mean().sqrt()) < 1.6


def test_diffusers_takes_it(miniature: AutoencoderKLHunyuanVideo, latents: Tensor) -> None:
    diffusers = pytest.importorskip("diffusers", reason="this machine has no diffusers to compare with")
    theirs = diffusers.AutoencoderKLHunyuanVideo.from_pretrained(DEMO, torch_dtype=torch.float32).eval()
    z = latents[..., :8, :8]
    with torch.inference_mode():
        expected = theirs.decode(z).sample
    assert_close(miniature.decode(z).sample, expected, 1e-5, "sums of the same numbers in another order")
