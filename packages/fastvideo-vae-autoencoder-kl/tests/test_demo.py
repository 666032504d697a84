"""The miniature that ships with the package: its size, and its quality on the photograph beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

import fastvideo_vae_core as fvae
from fastvideo_vae_autoencoder_kl.family import FAMILY
from fastvideo_vae_core.media.images import read_image
from fastvideo_vae_core.metrics import psnr
from fastvideo_vae_core.testing.threads import single_thread

DEMO = FAMILY.resource("demo")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with single_thread():
        yield


def test_it_is_small() -> None:
    sizes = {path.name: path.stat().st_size for path in DEMO.iterdir()}
    assert set(sizes) == {"README.md", "photograph.jpg", "config.json", "diffusion_pytorch_model.safetensors"}
    assert sizes["diffusion_pytorch_model.safetensors"] <= 3_000_000


def test_the_photograph_comes_back_as_well_as_the_readme_says() -> None:
    vae = fvae.load_demo("autoencoder_kl", dtype=torch.float32)
    x = read_image(DEMO / "photograph.jpg")[None]
    stated = re.search(r"\| astronaut \| 512 × 512 \| ([\d.]+) \|", (DEMO / "README.md").read_text(encoding="utf-8"))
    assert stated
    measured = float(psnr(x, vae(x)))
    assert measured >= 28
    # Levels are rounded for the table.
    assert measured == pytest.approx(float(stated[1]), abs=0.05)
