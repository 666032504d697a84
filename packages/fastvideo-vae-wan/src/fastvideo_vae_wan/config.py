"""Architecture of the Wan video autoencoders, and the published checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from fastvideo_vae_core.config import VAEArchConfig, bounded
from fastvideo_vae_core.errors import ConfigError

# Of the latents that the diffusion models were trained on; the official code has them beside the network.
_MEAN_16 = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_STD_16 = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
_MEAN_48 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
_STD_48 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WanArchConfig(VAEArchConfig):
    """Facts of a checkpoint, under the names and with the defaults of diffusers' `AutoencoderKLWan`.

    Attributes:
        base_dim, decoder_base_dim: width of the finest level of each half; the decoder's is the encoder's if None.
        dim_mult: width of each level, in base widths; each level but the last halves the picture.
        num_res_blocks: residual blocks in a level of the encoder; the decoder has one more.
        temperal_downsample: of each level but the last, whether it halves the frames too; so spelt by diffusers.
        is_residual: Wan 2.2: levels are bypassed by averages and repetitions.
        patch_size: Wan 2.2: pixels along each side of what the network takes for one; their channels are in
            `in_channels` and `out_channels`.
        latents_mean, latents_std: per channel; normalised latents are (z - mean) * (1 / std).
        scale_factor_temporal, scale_factor_spatial: frames and pixels for a latent; they follow from the levels.
        attn_scales, dropout: no published checkpoint has any; they must be empty and zero.
        clip_output: kept as it is found. Decoded video is clamped to [-1, 1] whatever it says, as diffusers and the
            official code do.

    Source: Wan-Video/Wan2.1 `wan/modules/vae.py`; Wan-Video/Wan2.2 `wan/modules/vae2_2.py`.
    """

    base_dim: int = bounded(96, 1, 4096)
    decoder_base_dim: int | None = bounded(None, 1, 4096)
    z_dim: int = bounded(16, 1, 1024)
    dim_mult: tuple[int, ...] = bounded((1, 2, 4, 4), 1, 64)
    num_res_blocks: int = bounded(2, 1, 32)
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: float = bounded(0.0, 0.0, 0.0)
    latents_mean: tuple[float, ...] = bounded(_MEAN_16, -1e6, 1e6)
    latents_std: tuple[float, ...] = bounded(_STD_16, 1e-6, 1e6)
    is_residual: bool = False
    in_channels: int = bounded(3, 1, 1024)
    out_channels: int = bounded(3, 1, 1024)
    patch_size: int | None = bounded(None, 1, 16)
    scale_factor_temporal: int | None = bounded(None, 1, 1 << 20)
    scale_factor_spatial: int | None = bounded(None, 1, 1 << 20)
    clip_output: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not len(self.temperal_downsample) + 1 == len(self.dim_mult) <= _MAX_LEVELS:
            raise ConfigError(
                f"dim_mult must have one entry more than temperal_downsample and at most {_MAX_LEVELS}; got"
                f" {len(self.dim_mult)} and {len(self.temperal_downsample)}"
            )
        if self.attn_scales:
            raise ConfigError(f"attn_scales must be empty, as in every published checkpoint; got {self.attn_scales}")
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise ConfigError(f"{name} needs {self.z_dim} values, got {len(getattr(self, name))}")
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) % self.patch**2:
                raise ConfigError(f"{name}={getattr(self, name)} does not divide into patches of {self.patch} pixels")
        derived = {
            "scale_factor_temporal": 1 << sum(self.temperal_downsample),
            "scale_factor_spatial": self.patch << (len(self.dim_mult) - 1),
        }
        for name, value in derived.items():
            if getattr(self, name) not in (None, value):
                raise ConfigError(f"{name} of these levels is {value}, got {getattr(self, name)}")
            object.__setattr__(self, name, value)

    @property
    def patch(self) -> int:
        """Pixels along each side of a patch."""
        return self.patch_size or 1

    @property
    def encoder_widths(self) -> tuple[int, ...]:
        """Channels of the levels of the encoder, the finest first."""
        return tuple(self.base_dim * each for each in self.dim_mult)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels of the levels of the decoder, the coarsest first."""
        return tuple((self.decoder_base_dim or self.base_dim) * each for each in reversed(self.dim_mult))


_MAX_LEVELS = 8

WAN21 = WanArchConfig()
WAN22 = WanArchConfig(
    base_dim=160,
    decoder_base_dim=256,
    z_dim=48,
    latents_mean=_MEAN_48,
    latents_std=_STD_48,
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
)
