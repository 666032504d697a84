"""The contract of every family, laid on the KL image autoencoders."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastvideo_vae_autoencoder_kl import FLUX1, SD1, AutoencoderKL, AutoencoderKLArchConfig
from fastvideo_vae_core.config import Fp16Policy, VAEConfig
from fastvideo_vae_core.errors import ShapeError
from fastvideo_vae_core.plan import Direction
from fastvideo_vae_core.testing.conformance import ConformanceSuite
from fastvideo_vae_core.testing.contract.hooks import VAE, both_directions
from fastvideo_vae_core.testing.golden import fill

# Three levels instead of four, and narrow; the last convolution is toned down, so that samples stay near [-1, 1].
SIZES = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 4,
    "layers_per_block": 1,
}


def filled(arch: AutoencoderKLArchConfig) -> AutoencoderKL:
    model = AutoencoderKL(VAEConfig(arch_config=arch))
    fill(model, gains={"decoder.conv_out.weight": 0.5})
    return model


class TestWithQuantConvolutions(ConformanceSuite):
    """As Stable Diffusion 1.x and SDXL have them."""

    blends = True
    latent_grids = ((1, 1), (3, 2), (5, 7))

    def tiny(self) -> AutoencoderKL:
        return filled(replace(SD1, **SIZES))

    @both_directions
    def test_out_of_memory_in_each_tile(self, vae: VAE, direction: Direction) -> None:
        self.check_exhausted_everywhere(vae, direction, grid=(5, 7), tile=(10, 10))


class TestWithoutQuantConvolutions(ConformanceSuite):
    """As SD3 and FLUX.1, with a shift; and attention in the levels, which no published checkpoint has."""

    blends = True
    latent_grids = ((1, 1), (3, 2), (4, 6))

    def tiny(self) -> AutoencoderKL:
        sizes = SIZES | {
            "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
            "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        }
        return filled(replace(FLUX1, **sizes))


@pytest.mark.parametrize(
    ("policy", "force_upcast", "computed", "because"),
    [
        ("auto", True, ("torch.float32", False), "force_upcast of the checkpoint"),
        ("auto", False, ("torch.float32", False), "CPUs are many times slower"),
        ("retry", True, ("torch.float16", True), "float32 again if float16 overflows"),
        ("off", True, ("torch.float16", False), ""),
    ],
)
def test_the_policy_decides_about_float16(
    policy: Fp16Policy, force_upcast: bool, computed: tuple[str, bool], because: str
) -> None:
    """SDXL's checkpoint says that it overflows, so its float16 weights compute in float32 unless told otherwise."""
    vae = filled(replace(SD1, **SIZES, force_upcast=force_upcast)).half()
    vae.config = replace(vae.config, fp16=policy)
    plan = vae.plan_decode((1, 4, 2, 2))
    assert (str(plan.dtype), plan.retry) == computed
    assert because in " ".join(plan.notes)


def test_an_image_smaller_than_a_latent_is_refused_with_the_smallest_that_works() -> None:
    vae = filled(replace(SD1, **SIZES))
    with pytest.raises(ShapeError, match="got 2 x 9; pass 4 x 8 or 4 x 12"):
        vae.encode(torch.zeros(1, 3, 2, 9))
    assert vae.encode(torch.zeros(1, 3, 4, 8)).latent_dist.mode().shape == (1, 4, 1, 2)
