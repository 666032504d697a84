"""Architecture of the Oobleck audio autoencoders, and the published checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from fastvideo_vae_core.config import VAEArchConfig, bounded
from fastvideo_vae_core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OobleckArchConfig(VAEArchConfig):
    """Facts of a checkpoint, under the names and with the defaults of diffusers' `AutoencoderOobleck`.

    Attributes:
        encoder_hidden_size: base width of the encoder, and its output channels: a mean and a scale for each latent
            channel.
        downsampling_ratios: stride of each stage of the encoder; the decoder has them in reverse.
        channel_multiples: width behind each stage, in base widths.
        decoder_channels: base width of the decoder.
        decoder_input_channels: channels of the latents.
        audio_channels: channels of the waveform.
        sampling_rate: in Hz.
        scaling_factor: normalised latents are z * scaling.

    Source: Stability-AI/stable-audio-tools `stable_audio_tools/models/autoencoders.py`.
    """

    encoder_hidden_size: int = bounded(128, 1, 8192)
    downsampling_ratios: tuple[int, ...] = bounded((2, 4, 4, 8, 8), 1, 256)
    channel_multiples: tuple[int, ...] = bounded((1, 2, 4, 8, 16), 1, 256)
    decoder_channels: int = bounded(128, 1, 8192)
    decoder_input_channels: int = bounded(64, 1, 4096)
    audio_channels: int = bounded(2, 1, 64)
    sampling_rate: int = bounded(44_100, 1, 1 << 24)

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = len(self.downsampling_ratios)
        if not stages == len(self.channel_multiples) <= _MAX_STAGES:
            raise ConfigError(
                f"downsampling_ratios and channel_multiples must be equally long, at most {_MAX_STAGES};"
                f" got {stages} and {len(self.channel_multiples)}"
            )
        if self.encoder_hidden_size != 2 * self.decoder_input_channels:
            raise ConfigError(
                "encoder_hidden_size must be twice decoder_input_channels, for a mean and a scale each;"
                f" got {self.encoder_hidden_size} and {self.decoder_input_channels}"
            )
        if not 1 < self.hop_length <= _MAX_HOP:
            raise ConfigError(f"downsampling_ratios must multiply to 2 to {_MAX_HOP}, got {self.hop_length}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a diffusers configuration, or the `model_config.json` of stable-audio-tools."""
        return super().from_dict(_from_official(config) if "model" in config else config)

    @property
    def hop_length(self) -> int:
        """Samples of a latent."""
        return math.prod(self.downsampling_ratios)

    @property
    def lead(self) -> int:
        """Samples that n latents fall short of n * hop_length: every odd stride loses one of its own outputs."""
        lost = 0
        for stride in reversed(self.downsampling_ratios):
            lost = lost * stride + stride % 2
        return lost


def _from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `model_config.json`, which describes an autoencoder or a model that has one inside."""
    try:
        model, scale = config["model"], 1.0
        if "encoder" not in model:
            pretransform = model["pretransform"]
            model, scale = pretransform["config"], float(pretransform.get("scale", 1.0))
        encoder, decoder = (_half(model[name], name) for name in ("encoder", "decoder"))
        ours = {
            "encoder_hidden_size": encoder["channels"],
            "downsampling_ratios": encoder["strides"],
            "channel_multiples": encoder["c_mults"],
            "decoder_channels": decoder["channels"],
            "decoder_input_channels": decoder["latent_dim"],
            "audio_channels": encoder["in_channels"],
            "sampling_rate": config["sample_rate"],
            # The official wrapper divides by its scale behind the encoder.
            "scaling_factor": 1.0 / scale,
        }
        bottleneck = model["bottleneck"]["type"]
        mirrored = {
            "encoder's latent_dim": (encoder["latent_dim"], encoder["channels"]),
            "decoder's strides": (decoder["strides"], encoder["strides"]),
            "decoder's c_mults": (decoder["c_mults"], encoder["c_mults"]),
            "decoder's out_channels": (decoder["out_channels"], encoder["in_channels"]),
        }
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"the model_config.json describes no Oobleck autoencoder: {error!r}") from None
    if bottleneck != "vae":
        raise ConfigError(f"the bottleneck must be of type 'vae', got {bottleneck!r}")
    if model.get("pretransform") or model.get("soft_clip"):
        raise ConfigError("an autoencoder with a pretransform or with soft_clip is another network")
    for name, (got, wanted) in mirrored.items():
        if got != wanted:
            raise ConfigError(f"the {name} must be {wanted}, got {got}; other networks are not supported")
    return ours


def _half(described: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The configuration of one half, with the official defaults."""
    kind, given = described["type"], {**_OFFICIAL_DEFAULTS[name], **described["config"]}
    if kind != "oobleck":
        raise ConfigError(f"the {name} must be of type 'oobleck', got {kind!r}")
    for option, wanted in _OFFICIAL_OPTIONS.items():
        if given.get(option, wanted) != wanted:
            raise ConfigError(f"the {name}'s {option} must be {wanted}, got {given[option]}; it is another network")
    return given


_OFFICIAL_DEFAULTS: dict[str, dict[str, Any]] = {
    "encoder": {
        "in_channels": 2,
        "channels": 128,
        "latent_dim": 32,
        "c_mults": [1, 2, 4, 8],
        "strides": [2, 4, 8, 8],
        "use_snake": False,
    },
    "decoder": {
        "out_channels": 2,
        "channels": 128,
        "latent_dim": 32,
        "c_mults": [1, 2, 4, 8],
        "strides": [2, 4, 8, 8],
        "use_snake": False,
        "final_tanh": True,
    },
}
_OFFICIAL_OPTIONS = {
    "use_snake": True,
    "final_tanh": False,
    "antialias_activation": False,
    "use_nearest_upsample": False,
}

_MAX_STAGES = 16
_MAX_HOP = 1 << 20

STABLE_AUDIO_OPEN = OobleckArchConfig()
ACE_STEP = OobleckArchConfig(downsampling_ratios=(2, 4, 4, 6, 10), sampling_rate=48_000)
