"""Architecture of the causal video autoencoder of Hunyuan-GameCraft and HunyuanVideo, and the published checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from fastvideo_vae_core.config import VAEArchConfig, bounded
from fastvideo_vae_core.errors import ConfigError

DownBlock = Literal["DownEncoderBlockCausal3D", "HunyuanVideoDownBlock3D"]
UpBlock = Literal["UpDecoderBlockCausal3D", "HunyuanVideoUpBlock3D"]
Activation = Literal["silu", "swish"]

# What official configurations say of how the official code runs. It is no fact of a checkpoint.
_EXECUTION = ("force_upcast", "use_trt_engine", "nccl_gather", "engine_path")


@dataclass(frozen=True, kw_only=True)
class HunyuanVideoArchConfig(VAEArchConfig):
    """Facts of a checkpoint, under the names and with the defaults of diffusers' `AutoencoderKLHunyuanVideo`.

    Attributes:
        block_out_channels: width of each level, the finest first.
        down_block_types, up_block_types: one for each level; diffusers' and the official names of one kind of block.
        layers_per_block: residual blocks in a level of the encoder; the decoder has one more.
        latent_channels: channels of the latents; the encoder gives twice as many.
        scaling_factor: normalised latents are z * scaling.
        spatial_compression_ratio: pixels along each side of a latent: the first levels halve the picture.
        temporal_compression_ratio: frames of a latent: the last levels but one halve the frames.
            `time_compression_ratio` in official configurations.
        mid_block_add_attention: whether the middle has attention.
        mid_block_causal_attn: whether a frame attends to itself and the frames before it, or to all. Configurations of
            HunyuanVideo do not name it, and its code always masks.
        sample_size, sample_tsize: pixels and frames above which the official code cuts into tiles; the network takes
            any.

    Source: Tencent-Hunyuan/Hunyuan-GameCraft-1.0 `hymm_sp/vae`; Tencent-Hunyuan/HunyuanVideo `hyvideo/vae`.
    """

    in_channels: int = bounded(3, 1, 64)
    out_channels: int = bounded(3, 1, 64)
    latent_channels: int = bounded(16, 1, 1024)
    down_block_types: tuple[DownBlock, ...] = ("HunyuanVideoDownBlock3D",) * 4
    up_block_types: tuple[UpBlock, ...] = ("HunyuanVideoUpBlock3D",) * 4
    block_out_channels: tuple[int, ...] = bounded((128, 256, 512, 512), 1, 8192)
    layers_per_block: int = bounded(2, 1, 32)
    act_fn: Activation = "silu"
    norm_num_groups: int = bounded(32, 1, 1024)
    scaling_factor: float = bounded(0.476986, 1e-6, 1e6)
    spatial_compression_ratio: int = bounded(8, 1, 1 << 10)
    temporal_compression_ratio: int = bounded(4, 4, 4)
    mid_block_add_attention: bool = True
    mid_block_causal_attn: bool = True
    sample_size: int = bounded(256, 1, 1 << 20)
    sample_tsize: int = bounded(64, 1, 1 << 20)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read diffusers' configuration or the official one, which names some things otherwise.

        Raises:
            ConfigError: a key is unknown, or asks for what no published checkpoint has.
        """
        given = {name: value for name, value in config.items() if name not in _EXECUTION}
        if given.pop("disable_causal_conv", False):
            raise ConfigError("disable_causal_conv must be off, as in every published checkpoint")
        official = given.pop("time_compression_ratio", None)
        if official is not None and given.setdefault("temporal_compression_ratio", official) != official:
            raise ConfigError("time_compression_ratio and temporal_compression_ratio are one thing and differ")
        return super().from_dict(given)

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
        space = self.spatial_compression_ratio
        if space & (space - 1) or not _log2(space) < levels:
            raise ConfigError(f"spatial_compression_ratio={space} is no power of two that {levels} levels can reach")
        if not _log2(self.temporal_compression_ratio) < levels:
            raise ConfigError(f"temporal_compression_ratio={self.temporal_compression_ratio} needs 3 levels or more")

    @property
    def strides(self) -> tuple[tuple[int, int, int], ...]:
        """Of frames, rows and columns, behind each level of the encoder; (1, 1, 1) where it keeps its size.

        Repetitions behind the levels of the decoder are the same, in the same order: the first levels double the
        picture, the last but one the frames.
        """
        last = len(self.block_out_channels) - 1
        space, time = _log2(self.spatial_compression_ratio), _log2(self.temporal_compression_ratio)
        return tuple(
            (2 if last - time <= level < last else 1, *(2 if level < space else 1,) * 2) for level in range(last + 1)
        )


def _log2(ratio: int) -> int:
    return ratio.bit_length() - 1


_MAX_LEVELS = 8

# One network and one scaling, which Tencent calls 884-16c: 8 x 8 pixels and 4 frames to a latent of 16 channels.
HUNYUANVIDEO = HunyuanVideoArchConfig()
GAMECRAFT = HUNYUANVIDEO
