"""The contract of every family, laid on the Wan autoencoders."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.errors import ShapeError
from fastvideo_vae_core.plan import Direction
from fastvideo_vae_core.testing.conformance import ConformanceSuite
from fastvideo_vae_core.testing.contract.execution import largest_grid
from fastvideo_vae_core.testing.contract.hooks import VAE, both_directions, distance
from fastvideo_vae_core.testing.golden import fill
from fastvideo_vae_wan import WAN21, WAN22, AutoencoderKLWan, WanArchConfig

# Three levels instead of four, and narrow.
LEVELS = {"dim_mult": (1, 2, 2), "num_res_blocks": 1, "scale_factor_temporal": None, "scale_factor_spatial": None}
TINY21 = replace(WAN21, **LEVELS, base_dim=4, temperal_downsample=(True, True))
TINY22 = replace(WAN22, **LEVELS, base_dim=4, decoder_base_dim=6, temperal_downsample=(False, True))


def filled(arch: WanArchConfig) -> AutoencoderKLWan:
    model = AutoencoderKLWan(VAEConfig(arch_config=arch))
    fill(model, gains={"decoder.conv_out.weight": 0.5})
    return model


class WanSuite(ConformanceSuite):
    stream_axis = 2
    blends = True

    @both_directions
    def test_tiles_and_slabs_of_pictures_larger_than_their_halos(self, vae64: VAE, direction: Direction) -> None:
        x = self.example(vae64, direction, batch=1, grid=(2, 24, 1))
        whole = self.run(vae64, direction, x)
        frames, _, width = largest_grid(vae64, x, direction)
        for rows in (16, 40):
            plan = self.plan(vae64, direction, tuple(x.shape), tile=(frames, rows, width))
            assert distance(self.run(vae64, direction, x, plan), whole) <= self.fp64_bound
        self.check_sharded(vae64, direction, x, 3, self.fp64_bound)

    def test_forward_is_decode_of_the_mode(self, vae64: VAE) -> None:
        """Without the clamp of `decode`, which would keep gradients from what leaves [-1, 1]."""
        x = self.example(vae64, "encode")
        expected = vae64.decode_unclamped(vae64.encode(x).latent_dist.mode())
        assert distance(vae64(x), expected) <= self.fp64_bound


class TestWan21(WanSuite):
    """Wan 2.1."""

    latent_grids = ((1, 1, 1), (2, 3, 1), (3, 2, 4))

    def tiny(self) -> AutoencoderKLWan:
        return filled(TINY21)

    @pytest.mark.slow
    @both_directions
    def test_out_of_memory_in_each_piece_of_frames(self, vae: VAE, direction: Direction) -> None:
        self.check_exhausted_everywhere(vae, direction, grid=(41, 2, 4), chunk=2)


class TestWan22(WanSuite):
    """Wan 2.2, with patches and shortcuts around the levels."""

    latent_grids = ((1, 1, 1), (2, 1, 3), (3, 4, 2))

    def tiny(self) -> AutoencoderKLWan:
        return filled(TINY22)

    def test_the_official_treatment_of_illegal_sizes_gives_the_promised_shape(self, vae: VAE) -> None:
        """Frames are dropped; pictures that do not divide make the official code fail, so they are refused."""
        vae.config = replace(vae.config, illegal_sizes="official")
        frames, *pictures = self.illegal_shapes(vae)
        assert vae.encode(torch.zeros(frames)).latent_dist.mean.shape == vae.encoded_shape(frames)
        for shape in pictures:
            with pytest.raises(ShapeError, match="pad_to_valid"):
                vae.encode(torch.zeros(shape))
