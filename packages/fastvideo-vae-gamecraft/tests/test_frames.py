"""Tiles of frames that follow one another, wherever the grids between the steps lie."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.plan import Direction
from fastvideo_vae_core.testing.golden import fill
from fastvideo_vae_gamecraft.config import HunyuanVideoArchConfig
from fastvideo_vae_gamecraft.model import AutoencoderKLHunyuanVideo

ARCH = HunyuanVideoArchConfig(
    block_out_channels=(8, 16, 16, 16), norm_num_groups=4, latent_channels=4, layers_per_block=1
)
SHAPES = {"decode": (1, 4, 3, 4, 4), "encode": (1, 3, 9, 32, 32)}


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLHunyuanVideo:
    made = AutoencoderKLHunyuanVideo(VAEConfig(arch_config=ARCH))
    fill(made)
    return made.double().eval().requires_grad_(False)


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_nothing_is_computed_twice_and_the_numbers_are_those_of_the_whole(
    vae: AutoencoderKLHunyuanVideo, direction: Direction, frames: int
) -> None:
    x = torch.randn(SHAPES[direction], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    make = vae.plan_decode if direction == "decode" else vae.plan_encode
    whole, tiled = vae._run(direction, x, make(x.shape)), make(x.shape, tile=(frames, 64, 64))
    assert tiled.recompute == 0.0
    steps, choice = len(vae._steps(direction)), random.Random(frames)
    for places in (["slabs"], ["slabs", "anew"], ["device", "slabs", "anew"]):
        plan = replace(
            tiled,
            places=(*choice.choices(places, k=steps - 1), "device"),
            host_shares=tuple(choice.choices([0.0, 0.3, 1.0], k=steps)),
            tiles=tuple((frames * by, 64, 64) for by in choice.choices([1, 1, 2], k=steps)),
        )
        assert float((vae._run(direction, x, plan) - whole).abs().max()) <= 1e-12, plan
