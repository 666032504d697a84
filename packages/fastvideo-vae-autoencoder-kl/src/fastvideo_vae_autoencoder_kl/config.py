"""Architecture of the KL image autoencoders, and the published checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from fastvideo_vae_core.config import VAEArchConfig, bounded
from fastvideo_vae_core.errors import ConfigError

DownBlock = Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]
UpBlock = Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]
Activation = Literal["silu", "swish", "mish", "gelu", "relu"]


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLArchConfig(VAEArchConfig):
    """Facts of a checkpoint, under the names and with the defaults of diffusers' `AutoencoderKL`.

    Attributes:
        block_out_channels: width of each level; each level but the last halves the picture.
        down_block_types, up_block_types: one for each level, with or without attention.
        layers_per_block: residual blocks in a level of the encoder; the decoder has one more.
        latent_channels: channels of the latents; the encoder gives twice as many.
        scaling_factor, shift_factor: normalised latents are (z - shift) * scaling.
        latents_mean, latents_std: per channel; where they are set, normalised latents are (z - mean) * scaling / std.
        sample_size: side of the pictures that the checkpoint was trained on, in pixels; the network takes any.
        force_upcast: the checkpoint overflows in float16.

    Source: CompVis/latent-diffusion `ldm/modules/diffusionmodules/model.py`; black-forest-labs/flux
    `src/flux/modules/autoencoder.py`.
    """

    in_channels: int = bounded(3, 1, 64)
    out_channels: int = bounded(3, 1, 64)
    down_block_types: tuple[DownBlock, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[UpBlock, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = bounded((64,), 1, 8192)
    layers_per_block: int = bounded(1, 1, 32)
    act_fn: Activation = "silu"
    latent_channels: int = bounded(4, 1, 1024)
    norm_num_groups: int = bounded(32, 1, 1024)
    sample_size: int = bounded(32, 1, 1 << 20)
    scaling_factor: float = bounded(0.18215, 1e-6, 1e6)
    shift_factor: float | None = bounded(None, -1e6, 1e6)
    latents_mean: tuple[float, ...] | None = bounded(None, -1e6, 1e6)
    latents_std: tuple[float, ...] | None = bounded(None, 1e-6, 1e6)
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = len(self.block_out_channels)
        if not levels == len(self.down_block_types) == len(self.up_block_types) <= _MAX_LEVELS:
            raise ConfigError(
                f"block_out_channels, down_block_types and up_block_types must be equally long, at most {_MAX_LEVELS};"
                f" got {levels}, {len(self.down_block_types)}, {len(self.up_block_types)}"
            )
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ConfigError(f"{width} channels do not divide into norm_num_groups={self.norm_num_groups}")
        if (self.latents_mean is None) != (self.latents_std is None):
            raise ConfigError("latents_mean and latents_std come together; one of them is missing")
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.latent_channels:
                raise ConfigError(f"{name} needs {self.latent_channels} values, got {len(values)}")

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels along each side of a latent."""
        return 1 << (len(self.block_out_channels) - 1)


_MAX_LEVELS = 8

_PUBLISHED = AutoencoderKLArchConfig(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
)
SD1 = replace(_PUBLISHED, sample_size=512)
SDXL = replace(_PUBLISHED, sample_size=1024, scaling_factor=0.13025)
_Z16 = replace(_PUBLISHED, sample_size=1024, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
SD3 = replace(_Z16, scaling_factor=1.5305, shift_factor=0.0609)
FLUX1 = replace(_Z16, scaling_factor=0.3611, shift_factor=0.1159)
