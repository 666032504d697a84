"""The contract of every family, laid on LTX-2's autoencoders. The vocoder only decodes; its tests are its own."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from fastvideo_vae_core.blending import Blend
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.errors import ConfigError, ShapeError
from fastvideo_vae_core.plan import Direction
from fastvideo_vae_core.testing.conformance import ConformanceSuite
from fastvideo_vae_core.testing.contract.hooks import VAE, both_directions
from fastvideo_vae_core.testing.golden import fill
from fastvideo_vae_ltx2 import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    LTX2AudioArchConfig,
    LTX2VideoArchConfig,
)

# Fewer levels than published, and narrow: reflections and bypasses as in 2.0, ...
TINY20 = LTX2VideoArchConfig(
    latent_channels=4,
    block_out_channels=(8, 16),
    down_block_types=("LTX2VideoDownBlock3D",) * 2,
    decoder_block_out_channels=(16, 32),
    layers_per_block=(1, 1, 1),
    decoder_layers_per_block=(1, 1, 2),
    spatio_temporal_scaling=(True,) * 2,
    decoder_spatio_temporal_scaling=(True,) * 2,
    decoder_inject_noise=(False,) * 3,
    downsample_type=("spatiotemporal",) * 2,
    upsample_type=("spatiotemporal",) * 2,
    upsample_residual=(True,) * 2,
    upsample_factor=(2, 2),
    patch_size=2,
    decoder_causal=False,
)
# ... and all kinds of levels as in 2.3.
TINY23 = replace(
    TINY20,
    block_out_channels=(8, 8, 8),
    down_block_types=("LTX2VideoDownBlock3D",) * 3,
    decoder_block_out_channels=(8, 8, 16),
    layers_per_block=(1, 0, 1, 1),
    decoder_layers_per_block=(1, 1, 1, 1),
    spatio_temporal_scaling=(True,) * 3,
    decoder_spatio_temporal_scaling=(True,) * 3,
    decoder_inject_noise=(False,) * 4,
    downsample_type=("spatial", "temporal", "spatiotemporal"),
    upsample_type=("spatiotemporal", "temporal", "spatial"),
    upsample_residual=(False,) * 3,
    upsample_factor=(2, 1, 2),
    patch_size=1,
    decoder_spatial_padding_mode="zeros",
    spatial_compression_ratio=None,
)
TINY_AUDIO = LTX2AudioArchConfig(base_channels=4, ch_mult=(1, 2, 2), num_res_blocks=1, latent_channels=2, mel_bins=8)


class VideoSuite(ConformanceSuite):
    stream_axis = 2
    blends = True
    arch: ClassVar[LTX2VideoArchConfig]

    def tiny(self) -> AutoencoderKLLTX2Video:
        model = AutoencoderKLLTX2Video(VAEConfig(arch_config=self.arch))
        fill(model)
        return model

    def test_the_official_treatment_of_illegal_sizes_gives_the_promised_shape(self, vae: VAE) -> None:
        """Frames are dropped; pictures that do not divide make the official code fail, so they are refused."""
        vae.config = replace(vae.config, illegal_sizes="official")
        frames, *pictures = self.illegal_shapes(vae)
        assert vae.encode(torch.zeros(frames)).latent_dist.mean.shape == vae.encoded_shape(frames)
        for shape in pictures:
            with pytest.raises(ShapeError, match="pad_to_valid"):
                vae.encode(torch.zeros(shape))


class TestVideo20(VideoSuite):
    """LTX-2.0: the decoder reflects pictures at their borders, so it needs two latents a side."""

    arch = TINY20
    latent_grids = ((1, 2, 2), (2, 3, 2), (3, 2, 3))

    def test_tiles_of_a_blend_need_two_latents_a_side_too(self, vae: VAE) -> None:
        blend = Blend(name="leaves one over", pixels=2 * vae.sample_axes[1].up, pixels_stride=vae.sample_axes[1].up)
        with pytest.raises(ShapeError, match=r"leaves one over.* needs 2 x 2 latents"):
            vae.plan_decode((1, vae.channels[1], 1, 3, 2), blend=blend)


class TestVideo23(VideoSuite):
    """LTX-2.3."""

    arch = TINY23
    latent_grids = ((1, 1, 1), (2, 1, 3), (3, 4, 2))


@pytest.mark.slow
class TestVideoTimed(VideoSuite):
    """A decoder that takes a timestep and, for once, is causal. Slow, because much of it is said twice above."""

    arch = replace(TINY20, timestep_conditioning=True, decoder_causal=True)
    latent_grids = ((1, 2, 2), (2, 2, 3))


class TestAudio(ConformanceSuite):
    """The audio autoencoder, whose second axis has one length."""

    latent_grids = ((1, 2), (2, 2), (5, 2))
    stream_axis = 2
    shares_streams = False

    def tiny(self) -> AutoencoderKLLTX2Audio:
        model = AutoencoderKLLTX2Audio(VAEConfig(arch_config=TINY_AUDIO))
        fill(model)
        return model

    def illegal_shapes(self, vae: VAE) -> list[tuple[int, ...]]:
        return [(1, 2, 18, 8)]

    def large(self, vae: VAE, direction: Direction) -> tuple[int, ...]:
        z_shape = (2, vae.channels[1], 500, 2)
        return z_shape if direction == "decode" else vae.decoded_shape(z_shape)

    def test_the_law_of_sizes_has_an_inverse(self, vae: VAE) -> None:
        for length in range(1, 40):
            z_shape = (3, vae.channels[1], length, 2)
            assert vae.encoded_shape(vae.decoded_shape(z_shape)) == z_shape
            assert vae.valid_sample_shape(vae.decoded_shape(z_shape)) == vae.decoded_shape(z_shape)

    @both_directions
    def test_tiling_can_be_configured(self, vae: VAE, direction: Direction) -> None:
        """Height and width are no sizes of a spectrogram: refused, in every way in which it can be asked for."""
        with pytest.raises(ConfigError, match="tiles in height and width"):
            vae.enable_tiling()
        vae.config = replace(vae.config, use_tiling=True)
        with pytest.raises(ConfigError, match="tiles in height and width"):
            self.plan(vae, direction, tuple(self.example(vae, direction).shape))
        with pytest.raises(ConfigError, match="tiles in height and width"):
            type(vae)(vae.config)
