"""Architecture of LTX-2's video autoencoder, audio autoencoder and vocoders, and the published checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from fastvideo_vae_core.config import VAEArchConfig, bounded
from fastvideo_vae_core.errors import ConfigError
from fastvideo_vae_ltx2 import official

_DOWN = "LTX2VideoDownBlock3D"
_DOUBLED = {"spatial": (False, True), "temporal": (True, False), "spatiotemporal": (True, True)}

Sampling = Literal["spatial", "temporal", "spatiotemporal"]


@dataclass(frozen=True, kw_only=True)
class LTX2VideoArchConfig(VAEArchConfig):
    """Facts of a video autoencoder, under the names and with the defaults of diffusers' `AutoencoderKLLTX2Video`.

    Attributes:
        in_channels, out_channels: of pictures.
        latent_channels: of latents.
        block_out_channels: width behind each change of resolution of the encoder, which begins with as many channels as
            a latent has; `decoder_block_out_channels`: width before each of the decoder, the finest first.
        layers_per_block, decoder_layers_per_block: residual blocks between them, the finest resolution first.
        downsample_type: of the changes of resolution, the finest first; `upsample_type`: those of the decoder, in the
            order in which they happen, the coarsest first.
        upsample_residual: whether each is bypassed by its input; `upsample_factor`: by how much each divides the width.
            Both the finest first.
        timestep_conditioning: the decoder takes a timestep.
        patch_size: pixels along each side of what the networks take for one.
        encoder_causal, decoder_causal: whether the halves see no later frames. No published decoder is causal, though
            diffusers' default says so.
        encoder_spatial_padding_mode, decoder_spatial_padding_mode: what convolutions see around a picture.
        scaling_factor: normalised latents are (z - mean) * scaling / std.
        spatial_compression_ratio, temporal_compression_ratio: pixels and frames for a latent; they follow from the
            levels.
        down_block_types, spatio_temporal_scaling, decoder_spatio_temporal_scaling, decoder_inject_noise, patch_size_t,
            resnet_norm_eps: as in every published checkpoint, see `_FIXED`; others are refused.

    Source: Lightricks/LTX-2 `ltx_core/model/video_vae`.
    """

    in_channels: int = bounded(3, 1, 64)
    out_channels: int = bounded(3, 1, 64)
    latent_channels: int = bounded(128, 1, 4096)
    block_out_channels: tuple[int, ...] = bounded((256, 512, 1024, 2048), 1, 16384)
    down_block_types: tuple[str, ...] = (_DOWN,) * 4
    decoder_block_out_channels: tuple[int, ...] = bounded((256, 512, 1024), 1, 16384)
    layers_per_block: tuple[int, ...] = bounded((4, 6, 6, 2, 2), 0, 64)
    decoder_layers_per_block: tuple[int, ...] = bounded((5, 5, 5, 5), 0, 64)
    spatio_temporal_scaling: tuple[bool, ...] = (True,) * 4
    decoder_spatio_temporal_scaling: tuple[bool, ...] = (True,) * 3
    decoder_inject_noise: tuple[bool, ...] = (False,) * 4
    downsample_type: tuple[Sampling, ...] = ("spatial", "temporal", "spatiotemporal", "spatiotemporal")
    upsample_type: tuple[Sampling, ...] = ("spatiotemporal",) * 3
    upsample_residual: tuple[bool, ...] = (True,) * 3
    upsample_factor: tuple[int, ...] = bounded((2, 2, 2), 1, 64)
    timestep_conditioning: bool = False
    patch_size: int = bounded(4, 1, 16)
    patch_size_t: int = bounded(1, 1, 1)
    resnet_norm_eps: float = bounded(1e-6, 0.0, 1.0)
    encoder_causal: bool = True
    decoder_causal: bool = True
    encoder_spatial_padding_mode: Literal["zeros", "reflect"] = "zeros"
    decoder_spatial_padding_mode: Literal["zeros", "reflect"] = "reflect"
    spatial_compression_ratio: int | None = bounded(None, 1, 1 << 16)
    temporal_compression_ratio: int | None = bounded(None, 1, 1 << 16)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_lengths()
        self._check_fixed()
        self._check_widths()
        halves = [self._ratios(kinds) for kinds in (self.downsample_type, self.upsample_type)]
        if halves[0] != halves[1]:
            raise ConfigError(f"encoder and decoder must compress alike, got {halves[0]} and {halves[1]}")
        for name, value in zip(("temporal_compression_ratio", "spatial_compression_ratio"), halves[0], strict=True):
            if getattr(self, name) not in (None, value):
                raise ConfigError(f"{name} of these levels is {value}, got {getattr(self, name)}")
            object.__setattr__(self, name, value)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a diffusers configuration, or the official one that stands in a checkpoint's metadata."""
        if official.is_video(config):
            config = official.video(config)
        given = dict(config)
        # diffusers takes one flag for all levels.
        for name, levels in (
            ("spatio_temporal_scaling", "downsample_type"),
            ("decoder_spatio_temporal_scaling", "upsample_type"),
            ("upsample_residual", "upsample_type"),
            ("decoder_inject_noise", "decoder_layers_per_block"),
        ):
            if isinstance(given.get(name), bool):
                given[name] = [given[name]] * len(given.get(levels, getattr(cls, levels, ())))
        return super().from_dict(given)

    @property
    def ratios(self) -> tuple[int, int]:
        """Frames, and pixels along each side, that a latent stands for."""
        return self._ratios(self.downsample_type)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels of the levels of the decoder, the coarsest first."""
        widths = [self.decoder_block_out_channels[-1]]
        for factor in reversed(self.upsample_factor):
            widths.append(widths[-1] // factor)
        return tuple(widths)

    def _ratios(self, kinds: tuple[Sampling, ...]) -> tuple[int, int]:
        time, space = (sum(_DOUBLED[kind][axis] for kind in kinds) for axis in (0, 1))
        return 1 << time, self.patch_size << space

    def _check_lengths(self) -> None:
        down, up = len(self.downsample_type), len(self.upsample_type)
        wanted = {
            "block_out_channels": down,
            "down_block_types": down,
            "spatio_temporal_scaling": down,
            "layers_per_block": down + 1,
            "decoder_block_out_channels": up,
            "decoder_spatio_temporal_scaling": up,
            "upsample_residual": up,
            "upsample_factor": up,
            "decoder_layers_per_block": up + 1,
            "decoder_inject_noise": up + 1,
        }
        for name, length in wanted.items():
            if len(getattr(self, name)) != length:
                raise ConfigError(f"{name} needs {length} entries for these levels, got {len(getattr(self, name))}")
        if not 1 <= max(down, up) <= _MAX_LEVELS:
            raise ConfigError(f"the networks must change the resolution 1 to {_MAX_LEVELS} times, got {down} and {up}")

    def _check_fixed(self) -> None:
        for name, wanted in _FIXED.items():
            got = getattr(self, name)
            if set(got) != {wanted} if isinstance(got, tuple) else got != wanted:
                raise ConfigError(f"{name} must be {wanted}, as in every published checkpoint; got {got}")

    def _check_widths(self) -> None:
        before = self.latent_channels
        for after, kind in zip(self.block_out_channels, self.downsample_type, strict=True):
            positions = _positions(kind)
            if after % positions or before * positions % after:
                raise ConfigError(f"{before} channels cannot become {after} where {positions} positions become one")
            before = after
        for width, listed, factor, kind, residual in zip(
            self.decoder_widths,
            self.decoder_block_out_channels[::-1],
            self.upsample_factor[::-1],
            self.upsample_type,
            self.upsample_residual[::-1],
            strict=False,
        ):
            positions = _positions(kind)
            if width != listed or width % factor:
                raise ConfigError(f"upsample_factor makes levels of {self.decoder_widths} channels, listed is {listed}")
            if residual and (width % positions or positions % factor):
                raise ConfigError(f"{width} channels cannot bypass a level that makes {positions} positions of one")


@dataclass(frozen=True, kw_only=True)
class LTX2AudioArchConfig(VAEArchConfig):
    """Facts of an audio autoencoder, under the names and with the defaults of diffusers' `AutoencoderKLLTX2Audio`.

    Attributes:
        base_channels, ch_mult: width of the finest level, and of each level in such widths; each but the last halves
            frames and mel bins.
        num_res_blocks: residual blocks in a level of the encoder; the decoder has one more.
        in_channels, output_channels: channels of sound.
        latent_channels: of latents.
        sample_rate, mel_hop_length, mel_bins: of the spectrograms that go in.
        resolution: kept as it is found; it would only say which levels attend.
        attn_resolutions, norm_type, causality_axis, dropout, mid_block_add_attention, is_causal, double_z: as in every
            published checkpoint; others are refused.

    Source: Lightricks/LTX-2 `ltx_core/model/audio_vae/audio_vae.py`.
    """

    base_channels: int = bounded(128, 1, 8192)
    output_channels: int = bounded(2, 1, 64)
    ch_mult: tuple[int, ...] = bounded((1, 2, 4), 1, 256)
    num_res_blocks: int = bounded(2, 1, 64)
    attn_resolutions: tuple[int, ...] | None = None
    in_channels: int = bounded(2, 1, 64)
    resolution: int = bounded(256, 1, 1 << 20)
    latent_channels: int = bounded(8, 1, 4096)
    norm_type: Literal["pixel"] = "pixel"
    causality_axis: Literal["height"] = "height"
    dropout: float = bounded(0.0, 0.0, 0.0)
    mid_block_add_attention: bool = False
    sample_rate: int = bounded(16_000, 1, 1 << 24)
    mel_hop_length: int = bounded(160, 1, 1 << 20)
    is_causal: bool = True
    mel_bins: int = bounded(64, 1, 4096)
    double_z: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, wanted in {"mid_block_add_attention": False, "is_causal": True, "double_z": True}.items():
            if getattr(self, name) != wanted:
                raise ConfigError(f"{name} must be {wanted}, as in every published checkpoint")
        if self.attn_resolutions:
            raise ConfigError(
                f"attn_resolutions must be empty, as in published checkpoints; got {self.attn_resolutions}"
            )
        object.__setattr__(self, "attn_resolutions", None)
        if len(self.ch_mult) > _MAX_LEVELS or self.mel_bins % self.ratio:
            raise ConfigError(f"{self.mel_bins} mel bins cannot be halved {len(self.ch_mult) - 1} times")
        if self.in_channels != self.output_channels:
            raise ConfigError(
                f"sound goes in with {self.in_channels} channels and comes out with {self.output_channels}"
            )
        if self.latent_channels * self.mel_bins // self.ratio != self.base_channels:
            raise ConfigError(
                f"the statistics have base_channels={self.base_channels} values, latents"
                f" {self.latent_channels} x {self.mel_bins // self.ratio}"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a diffusers configuration, or the official one that stands in a checkpoint's metadata."""
        return super().from_dict(official.audio(config) if official.is_audio(config) else config)

    @property
    def ratio(self) -> int:
        """Frames, and mel bins, that a latent stands for."""
        return 1 << (len(self.ch_mult) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the levels, the finest first."""
        return tuple(self.base_channels * each for each in self.ch_mult)


@dataclass(frozen=True, kw_only=True)
class LTX2VocoderArchConfig(VAEArchConfig):
    """Facts of a vocoder, under the names and with the defaults of diffusers' `LTX2Vocoder` and `LTX2VocoderWithBWE`.

    Attributes:
        in_channels: channels of sound times mel bins; `out_channels`: channels of sound.
        hidden_channels: width behind the first convolution; each stage halves it.
        upsample_kernel_sizes, upsample_factors: of the stages.
        resnet_kernel_sizes: of the residual blocks of a stage, which are averaged; `resnet_dilations` of each block.
        act_fn: "leaky_relu", or "snakebeta" between filters against aliasing, which `antialias` must then be.
        leaky_relu_negative_slope: of all but the last activation, which has 0.01.
        final_act_fn: of the waveform. With bandwidth extension None is a clamp to [-1, 1] too, as in the official code,
            on the first stage and on the result.
        output_sampling_rate: in Hz.
        bwe_*: the second generator, which extends the bandwidth; without `bwe_hidden_channels` there is none.
        filter_length, hop_length, window_length, num_mel_channels: of the spectrogram that it takes.
        input_sampling_rate: of the waveform that it extends.

    Source: Lightricks/LTX-2 `ltx_core/model/audio_vae/vocoder.py`.
    """

    in_channels: int = bounded(128, 1, 65536)
    hidden_channels: int = bounded(1024, 1, 65536)
    out_channels: int = bounded(2, 1, 64)
    upsample_kernel_sizes: tuple[int, ...] = bounded((16, 15, 8, 4, 4), 1, 1024)
    upsample_factors: tuple[int, ...] = bounded((6, 5, 2, 2, 2), 1, 256)
    resnet_kernel_sizes: tuple[int, ...] = bounded((3, 7, 11), 1, 255)
    resnet_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5),) * 3
    act_fn: Literal["leaky_relu", "snakebeta"] = "leaky_relu"
    leaky_relu_negative_slope: float = bounded(0.1, 0.0, 1.0)
    antialias: bool = False
    antialias_ratio: int = bounded(2, 2, 2)
    antialias_kernel_size: int = bounded(12, 12, 12)
    final_act_fn: Literal["tanh", "clamp"] | None = "tanh"
    final_bias: bool = True
    output_sampling_rate: int = bounded(24_000, 1, 1 << 24)
    bwe_in_channels: int | None = bounded(None, 1, 65536)
    bwe_hidden_channels: int | None = bounded(None, 1, 65536)
    bwe_out_channels: int | None = bounded(None, 1, 64)
    bwe_upsample_kernel_sizes: tuple[int, ...] | None = bounded(None, 1, 1024)
    bwe_upsample_factors: tuple[int, ...] | None = bounded(None, 1, 256)
    bwe_resnet_kernel_sizes: tuple[int, ...] | None = bounded(None, 1, 255)
    bwe_resnet_dilations: tuple[tuple[int, ...], ...] | None = None
    bwe_act_fn: Literal["leaky_relu", "snakebeta"] | None = None
    bwe_leaky_relu_negative_slope: float | None = bounded(None, 0.0, 1.0)
    bwe_antialias: bool | None = None
    bwe_antialias_ratio: int | None = bounded(None, 2, 2)
    bwe_antialias_kernel_size: int | None = bounded(None, 12, 12)
    bwe_final_act_fn: None = None
    bwe_final_bias: bool | None = None
    filter_length: int | None = bounded(None, 2, 1 << 16)
    hop_length: int | None = bounded(None, 1, 1 << 16)
    window_length: int | None = bounded(None, 2, 1 << 16)
    num_mel_channels: int | None = bounded(None, 1, 4096)
    input_sampling_rate: int | None = bounded(None, 1, 1 << 24)

    def __post_init__(self) -> None:
        super().__post_init__()
        extended = self.bwe_hidden_channels is not None
        for name in _EXTENSION:
            if (getattr(self, name) is not None) != extended:
                raise ConfigError(f"{name} and bwe_hidden_channels belong together; give both or neither")
        for generator in (self.generator, self.extension):
            if generator is not None:
                generator.check()
        if extended:
            self._check_extension()
            # Clamped it is in any case, so that the two spellings are one configuration.
            if self.final_act_fn == "clamp":
                object.__setattr__(self, "final_act_fn", None)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a diffusers configuration, or the official one that stands in a checkpoint's metadata."""
        if official.is_vocoder(config):
            config = official.vocoder(config)
        extended = config.get("bwe_hidden_channels") is not None or config.get("_class_name") == "LTX2VocoderWithBWE"
        # The defaults of diffusers' class with bandwidth extension are other ones.
        return super().from_dict({**(LTX23_VOCODER.to_dict() if extended else {}), **config})

    @property
    def generator(self) -> Generator:
        """The network that makes the waveform, or with bandwidth extension its first stage."""
        return Generator(
            in_channels=self.in_channels,
            hidden_channels=self.hidden_channels,
            out_channels=self.out_channels,
            kernel_sizes=self.upsample_kernel_sizes,
            factors=self.upsample_factors,
            resnet_kernel_sizes=self.resnet_kernel_sizes,
            resnet_dilations=self.resnet_dilations,
            act_fn=self.act_fn,
            antialias=self.antialias,
            slope=self.leaky_relu_negative_slope,
            final_bias=self.final_bias,
        )

    @property
    def extension(self) -> Generator | None:
        """The network that extends the bandwidth."""
        if self.bwe_hidden_channels is None:
            return None
        values = {name: getattr(self, f"bwe_{field}") for name, field in _FIELDS.items()}
        return Generator(**values)

    @property
    def hop(self) -> int:
        """Samples of the result that a frame of the spectrogram stands for."""
        factor = math.prod(self.upsample_factors)
        if self.input_sampling_rate is not None:
            factor = factor * self.output_sampling_rate // self.input_sampling_rate
        return factor

    def _check_extension(self) -> None:
        assert self.extension is not None
        assert self.input_sampling_rate is not None
        assert self.hop_length is not None
        assert self.filter_length is not None
        ratio, odd = divmod(self.output_sampling_rate, self.input_sampling_rate)
        if odd or self.extension.factor != self.hop_length * ratio:
            raise ConfigError(
                f"the extension makes {self.extension.factor} samples of {self.hop_length}, from"
                f" {self.input_sampling_rate} to {self.output_sampling_rate} Hz; the rates must divide"
            )
        if self.generator.factor % self.hop_length:
            raise ConfigError(f"a frame of {self.generator.factor} samples must be whole hops of {self.hop_length}")
        if self.window_length != self.filter_length or self.filter_length % 2 or self.hop_length > self.filter_length:
            raise ConfigError(f"window_length and filter_length must be one even number, got {self.window_length}")
        if self.extension.in_channels != self.out_channels * (self.num_mel_channels or 0):
            raise ConfigError("bwe_in_channels must be out_channels times num_mel_channels")


@dataclass(frozen=True, kw_only=True)
class Generator:
    """One generator of a vocoder; fields as in `LTX2VocoderArchConfig`."""

    in_channels: int
    hidden_channels: int
    out_channels: int
    kernel_sizes: tuple[int, ...]
    factors: tuple[int, ...]
    resnet_kernel_sizes: tuple[int, ...]
    resnet_dilations: tuple[tuple[int, ...], ...]
    act_fn: Literal["leaky_relu", "snakebeta"]
    antialias: bool
    slope: float
    final_bias: bool

    @property
    def factor(self) -> int:
        """Samples of a frame."""
        return math.prod(self.factors)

    def check(self) -> None:
        """Refuse what the network cannot be built with."""
        if not len(self.kernel_sizes) == len(self.factors) <= _MAX_LEVELS:
            raise ConfigError(f"upsample_kernel_sizes and upsample_factors must be equally long, at most {_MAX_LEVELS}")
        for kernel, factor in zip(self.kernel_sizes, self.factors, strict=True):
            if kernel < factor or (kernel - factor) % 2:
                raise ConfigError(f"a kernel of {kernel} cannot make {factor} samples of one; both even or both odd")
        if self.hidden_channels % (1 << len(self.factors)):
            raise ConfigError(f"hidden_channels={self.hidden_channels} cannot be halved {len(self.factors)} times")
        if len(self.resnet_dilations) != len(self.resnet_kernel_sizes):
            raise ConfigError("resnet_kernel_sizes and resnet_dilations must be equally long")
        if any(kernel % 2 == 0 for kernel in self.resnet_kernel_sizes):
            raise ConfigError(f"resnet_kernel_sizes must be odd, got {self.resnet_kernel_sizes}")
        if any(not 1 <= each <= 1024 for row in self.resnet_dilations for each in row):
            raise ConfigError(f"resnet_dilations must lie in [1, 1024], got {self.resnet_dilations}")
        if self.antialias != (self.act_fn == "snakebeta"):
            raise ConfigError("antialias belongs to act_fn='snakebeta', and to it alone")


def _positions(kind: Sampling) -> int:
    time, space = _DOUBLED[kind]
    return (1 + time) * (1 + 3 * space)


# Fields of a Generator -> names in the configuration of a vocoder, there behind "bwe_" for the second one.
_FIELDS = {
    "in_channels": "in_channels",
    "hidden_channels": "hidden_channels",
    "out_channels": "out_channels",
    "kernel_sizes": "upsample_kernel_sizes",
    "factors": "upsample_factors",
    "resnet_kernel_sizes": "resnet_kernel_sizes",
    "resnet_dilations": "resnet_dilations",
    "act_fn": "act_fn",
    "antialias": "antialias",
    "slope": "leaky_relu_negative_slope",
    "final_bias": "final_bias",
}
_EXTENSION = (
    *(f"bwe_{name}" for name in _FIELDS.values()),
    "bwe_antialias_ratio",
    "bwe_antialias_kernel_size",
    "filter_length",
    "hop_length",
    "window_length",
    "num_mel_channels",
    "input_sampling_rate",
)
_FIXED: dict[str, Any] = {
    "down_block_types": _DOWN,
    "spatio_temporal_scaling": True,
    "decoder_spatio_temporal_scaling": True,
    "decoder_inject_noise": False,
    "encoder_causal": True,
}
_MAX_LEVELS = 8

LTX20_VIDEO = LTX2VideoArchConfig(decoder_causal=False)
LTX20_VIDEO_TIMED = LTX2VideoArchConfig(decoder_causal=False, timestep_conditioning=True)
LTX23_VIDEO = LTX2VideoArchConfig(
    block_out_channels=(256, 512, 1024, 1024),
    decoder_block_out_channels=(256, 512, 512, 1024),
    layers_per_block=(4, 6, 4, 2, 2),
    decoder_layers_per_block=(4, 6, 4, 2, 2),
    decoder_spatio_temporal_scaling=(True,) * 4,
    decoder_inject_noise=(False,) * 5,
    upsample_type=("spatiotemporal", "spatiotemporal", "temporal", "spatial"),
    upsample_residual=(False,) * 4,
    upsample_factor=(2, 2, 1, 2),
    decoder_causal=False,
    decoder_spatial_padding_mode="zeros",
)
LTX2_AUDIO = LTX2AudioArchConfig()
LTX20_VOCODER = LTX2VocoderArchConfig()
LTX23_VOCODER = LTX2VocoderArchConfig(
    hidden_channels=1536,
    upsample_kernel_sizes=(11, 4, 4, 4, 4, 4),
    upsample_factors=(5, 2, 2, 2, 2, 2),
    act_fn="snakebeta",
    antialias=True,
    final_act_fn=None,
    final_bias=False,
    output_sampling_rate=48_000,
    bwe_in_channels=128,
    bwe_hidden_channels=512,
    bwe_out_channels=2,
    bwe_upsample_kernel_sizes=(12, 11, 4, 4, 4),
    bwe_upsample_factors=(6, 5, 2, 2, 2),
    bwe_resnet_kernel_sizes=(3, 7, 11),
    bwe_resnet_dilations=((1, 3, 5),) * 3,
    bwe_act_fn="snakebeta",
    bwe_leaky_relu_negative_slope=0.1,
    bwe_antialias=True,
    bwe_antialias_ratio=2,
    bwe_antialias_kernel_size=12,
    bwe_final_bias=False,
    filter_length=512,
    hop_length=80,
    window_length=512,
    num_mel_channels=64,
    input_sampling_rate=16_000,
)
