"""The contract of every family, laid on the autoencoder of GameCraft and HunyuanVideo."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.errors import ConfigError
from fastvideo_vae_core.testing.conformance import ConformanceSuite
from fastvideo_vae_core.testing.contract.hooks import VAE
from fastvideo_vae_core.testing.golden import fill
from fastvideo_vae_gamecraft import GAMECRAFT, OFFICIAL, AutoencoderKLHunyuanVideo, Blend, HunyuanVideoArchConfig

# Three levels instead of four, and narrow.
TINY = replace(
    GAMECRAFT,
    block_out_channels=(4, 8, 8),
    down_block_types=("HunyuanVideoDownBlock3D",) * 3,
    up_block_types=("HunyuanVideoUpBlock3D",) * 3,
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=2,
    spatial_compression_ratio=4,
)


def filled(arch: HunyuanVideoArchConfig) -> AutoencoderKLHunyuanVideo:
    model = AutoencoderKLHunyuanVideo(VAEConfig(arch_config=arch))
    fill(model, gains={"decoder.conv_out.conv.weight": 0.5})
    return model


class TestHunyuanVideo(ConformanceSuite):
    """As published: the attention is masked."""

    blends = True
    latent_grids = ((1, 1, 1), (2, 3, 1), (3, 2, 3))

    def tiny(self) -> AutoencoderKLHunyuanVideo:
        return filled(TINY)

    def test_a_blend_is_labelled_and_stands_alone(self, vae: VAE) -> None:
        assert isinstance(vae, AutoencoderKLHunyuanVideo)
        plan = vae.plan_decode((1, 4, 3, 2, 2), blend=OFFICIAL)
        for part in ("blended", "official", "64 frames every 48", "256 pixels every 192", "not the numbers"):
            assert part in str(plan)
        with pytest.raises(ConfigError, match="its own tiles"):
            vae.plan_decode((1, 4, 3, 2, 2), blend=OFFICIAL, tile=(4, 4, 4))
        with pytest.raises(ConfigError, match="multiples of 4"):
            vae.plan_decode((1, 4, 3, 2, 2), blend=Blend(name="odd", pixels=18, pixels_stride=16))
        vae.enable_tiling()
        vae.enable_blending(OFFICIAL)
        assert vae.plan_decode((1, 4, 3, 2, 2)).mode == "blended"
        vae.disable_blending()
        assert vae.plan_decode((1, 4, 3, 2, 2)).mode == "whole"


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
@pytest.mark.parametrize("batch", [1, 2])
def test_any_piece_of_a_clip_at_a_time(chunk: int, batch: int) -> None:
    """Float64: sums of the same numbers in another order."""
    vae = filled(TINY).double().eval().requires_grad_(False)
    z = torch.randn(batch, 4, 4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = vae.decode(z).sample
    plans = vae.plan_decode(z.shape, chunk=chunk), vae.plan_encode(x.shape, chunk=chunk)
    assert {plan.chunk for plan in plans} == {min(chunk, 4)}
    assert (vae.decode(z, plan=plans[0]).sample - x).abs().max() <= 1e-12
    gap = vae.encode(x, plan=plans[1]).latent_dist.mean - vae.encode(x).latent_dist.mean
    assert gap.abs().max() <= 1e-12
    with pytest.raises(ConfigError, match="chunk=0"):
        vae.plan_decode(z.shape, chunk=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spatial_compression_ratio": 6}, "no power of two"),
        ({"spatial_compression_ratio": 16}, "no power of two that 4 levels"),
        ({"temporal_compression_ratio": 8}, "temporal_compression_ratio"),
        ({"time_compression_ratio": 2}, "differ|temporal_compression_ratio"),
        ({"time_compression_ratio": 4, "temporal_compression_ratio": 8}, "one thing and differ"),
        ({"disable_causal_conv": True}, "disable_causal_conv must be off"),
        ({"block_out_channels": [128, 256, 512]}, "equally long"),
        ({"norm_num_groups": 48}, "do not divide"),
        ({"act_fn": "gelu"}, "act_fn"),
        ({"attention": 1}, "no field attention"),
    ],
    ids=str,
)
def test_a_configuration_of_something_else_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HunyuanVideoArchConfig.from_dict(options)
