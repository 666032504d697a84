"""The official configurations, as they stand in a checkpoint's metadata, under diffusers' names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastvideo_vae_core.errors import ConfigError

Config = Mapping[str, Any]

_KINDS = {"space": "spatial", "time": "temporal", "all": "spatiotemporal"}
_DIFFUSION = (
    "this is LTX-2.5, whose video decoder is a diffusion model and not supported; LTX-2.0 and 2.3 are, and so are"
    " the audio autoencoder and the vocoder of the same file"
)


def from_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The configuration of a single file: sections "vae", "audio_vae" and "vocoder"; empty where there is none.

    Raises:
        ConfigError: it is no JSON object.
    """
    try:
        config = json.loads(metadata.get("config", "{}"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the configuration in the metadata is no readable JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"the configuration in the metadata must be a JSON object, got {type(config).__name__}")
    return config


def is_video(config: Config) -> bool:
    """Whether it is the official configuration of a video autoencoder, or holds one."""
    return not {"vae", "encoder_blocks", "decoder_blocks"}.isdisjoint(config) or _is_diffusion(config)


def is_audio(config: Config) -> bool:
    """Whether it is the official configuration of an audio autoencoder, or holds one."""
    return "audio_vae" in config or "ddconfig" in config.get("model", {}).get("params", {})


def is_vocoder(config: Config) -> bool:
    """Whether it is the official configuration of a vocoder, or holds one."""
    return not {"vocoder", "bwe", "upsample_initial_channel"}.isdisjoint(config)


def refuse_diffusion() -> ConfigError:
    """What is said of LTX-2.5."""
    return ConfigError(_DIFFUSION)


def video(config: Config) -> dict[str, Any]:
    """The configuration of a video autoencoder from its lists of blocks.

    Raises:
        ConfigError: a block or an option is none of LTX-2.0's and 2.3's, or it is LTX-2.5.
    """
    config = _section(config, "vae")
    if _is_diffusion(config):
        raise refuse_diffusion()
    _require(config, "a video autoencoder", _VIDEO_OPTIONS)
    latents, base = config.get("latent_channels", 128), config.get("decoder_base_channels", 128)
    depths, kinds, options = _blocks(config, "encoder_blocks", "_res")
    widths = [latents]
    for each in options:
        widths.append(widths[-1] * each.get("multiplier", 2))
    up_depths, up_kinds, up_options = _blocks(config, "decoder_blocks", "")
    factors = [each.get("multiplier", 1) for each in up_options]
    up_widths = [base]
    for factor in factors:
        up_widths.append(up_widths[-1] * factor)
    both = config.get("spatial_padding_mode")
    return {
        "in_channels": config.get("in_channels", 3),
        "out_channels": config.get("out_channels", 3),
        "latent_channels": latents,
        "block_out_channels": widths[1:],
        "down_block_types": ["LTX2VideoDownBlock3D"] * len(kinds),
        "decoder_block_out_channels": up_widths[1:],
        "layers_per_block": depths,
        "decoder_layers_per_block": up_depths,
        "spatio_temporal_scaling": [True] * len(kinds),
        "decoder_spatio_temporal_scaling": [True] * len(up_kinds),
        "decoder_inject_noise": [False] * len(up_depths),
        "downsample_type": kinds,
        # The one list that diffusers has in the order in which things happen.
        "upsample_type": up_kinds[::-1],
        "upsample_residual": [
            bool(each.get("residual", False)) and kind == "spatiotemporal"
            for each, kind in zip(up_options, up_kinds, strict=True)
        ],
        "upsample_factor": factors,
        # The official default; published files say it.
        "timestep_conditioning": config.get("timestep_conditioning", True),
        "patch_size": config.get("patch_size", 4),
        "decoder_causal": config.get("causal_decoder", False),
        # One key for both halves; without it they differ.
        "encoder_spatial_padding_mode": both or config.get("encoder_spatial_padding_mode", "zeros"),
        "decoder_spatial_padding_mode": both or "reflect",
    }


def audio(config: Config) -> dict[str, Any]:
    """The configuration of an audio autoencoder.

    Raises:
        ConfigError: an option is none of the published ones.
    """
    config = _section(config, "audio_vae")
    parameters = _object(_object(config, "model"), "params")
    network, preprocessing = _object(parameters, "ddconfig"), _object(config, "preprocessing")
    stft, mel = _object(preprocessing, "stft"), _object(preprocessing, "mel")
    _require(network, "an audio autoencoder", {"attn_type": "vanilla", "resamp_with_conv": True})
    bins = network.get("mel_bins") or mel.get("n_mel_channels")
    return {
        "base_channels": network.get("ch", 128),
        "output_channels": network.get("out_ch", 2),
        "ch_mult": network.get("ch_mult", [1, 2, 4]),
        "num_res_blocks": network.get("num_res_blocks", 2),
        # The official defaults, which no published checkpoint has.
        "attn_resolutions": network.get("attn_resolutions", [8, 16, 32]),
        "mid_block_add_attention": network.get("mid_block_add_attention", True),
        "in_channels": network.get("in_channels", 2),
        "resolution": network.get("resolution", 256),
        "latent_channels": network.get("z_channels", 8),
        "norm_type": network.get("norm_type", "pixel"),
        "causality_axis": network.get("causality_axis", "height"),
        "dropout": network.get("dropout", 0.0),
        "sample_rate": parameters.get("sampling_rate", 16_000),
        "mel_hop_length": stft.get("hop_length", 160),
        "is_causal": stft.get("causal", True),
        "mel_bins": 64 if bins is None else bins,
        "double_z": network.get("double_z", True),
    }


def vocoder(config: Config) -> dict[str, Any]:
    """The configuration of a vocoder, with bandwidth extension or without.

    Raises:
        ConfigError: an option is none of the published ones.
    """
    # With bandwidth extension the section has a section of its own name.
    while "vocoder" in config and "bwe" not in config:
        config = _object(config, "vocoder")
    if "bwe" not in config:
        _require(config, "a vocoder", {"resblock": "1", "stereo": True})
        return {
            **_generator(config, "leaky_relu"),
            "antialias": False,
            "final_act_fn": "tanh" if config.get("use_tanh_at_final", True) else "clamp",
            "output_sampling_rate": config.get("output_sampling_rate", 24_000),
        }
    first, second = _object(config, "vocoder"), _object(config, "bwe")
    for each in (first, second):
        _require(each, "a vocoder with bandwidth extension", {"resblock": "AMP1", "stereo": True})
        if each.get("activation") != "snakebeta":
            raise ConfigError(f"the activation of a vocoder must be 'snakebeta', got {each.get('activation')!r}")
    try:
        analysis = {
            "filter_length": second["n_fft"],
            "window_length": second["n_fft"],
            "hop_length": second["hop_length"],
            "num_mel_channels": second["num_mels"],
            "input_sampling_rate": second["input_sampling_rate"],
            "output_sampling_rate": second["output_sampling_rate"],
        }
    except KeyError as error:
        raise ConfigError(f"the configuration of the bandwidth extension has no {error}") from None
    extension = _generator(second, "snakebeta")
    return {
        **_generator(first, "snakebeta"),
        "antialias": True,
        "final_act_fn": "tanh" if first.get("use_tanh_at_final", True) else "clamp",
        **{f"bwe_{name}": value for name, value in extension.items()},
        "bwe_antialias": True,
        "bwe_antialias_ratio": 2,
        "bwe_antialias_kernel_size": 12,
        **analysis,
    }


def _generator(config: Config, act_fn: str) -> dict[str, Any]:
    return {
        # Production checkpoints are in stereo, with 64 mel bins.
        "in_channels": 128,
        "out_channels": 2,
        "hidden_channels": config.get("upsample_initial_channel", 1024),
        "upsample_kernel_sizes": config.get("upsample_kernel_sizes", [16, 15, 8, 4, 4]),
        "upsample_factors": config.get("upsample_rates", [6, 5, 2, 2, 2]),
        "resnet_kernel_sizes": config.get("resblock_kernel_sizes", [3, 7, 11]),
        "resnet_dilations": config.get("resblock_dilation_sizes", [[1, 3, 5]] * 3),
        "act_fn": act_fn,
        "leaky_relu_negative_slope": 0.1,
        "final_bias": config.get("use_bias_at_final", True),
    }


def _blocks(config: Config, name: str, suffix: str) -> tuple[list[int], list[str], list[dict[str, Any]]]:
    """Residual blocks of each resolution, and kinds and options of the changes of resolution between them."""
    depths: list[int] = []
    kinds: list[str] = []
    options: list[dict[str, Any]] = []
    for entry in config.get(name, []):
        try:
            block, given = entry
            option = {"num_layers": given} if isinstance(given, int) else dict(given)
        except (TypeError, ValueError):
            raise ConfigError(f"{name} must be a list of names and options, got {entry!r}") from None
        kind = _KINDS.get(str(block).removeprefix("compress_").removesuffix(suffix))
        if block == "res_x" and len(depths) == len(kinds):
            if option.get("inject_noise", False):
                raise ConfigError(f"{name}: inject_noise is not supported, no published checkpoint has it")
            depths.append(option.get("num_layers", 0))
        elif kind is not None and block == f"compress_{_SHORT[kind]}{suffix}" and len(depths) == len(kinds) + 1:
            kinds.append(kind)
            options.append(option)
        else:
            raise ConfigError(
                f"{name}: {block!r} is not supported there; LTX-2.0 and 2.3 have res_x and compress_*{suffix} in turns"
            )
    if len(depths) != len(kinds) + 1:
        raise ConfigError(f"{name} must begin and end with res_x")
    return depths, kinds, options


def _section(config: Config, name: str) -> Config:
    return _object(config, name) if name in config else config


def _object(config: Config, name: str) -> Config:
    value = config.get(name, {})
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a JSON object, got {type(value).__name__}")
    return value


def _require(config: Config, what: str, wanted: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        if config.get(name, value) != value:
            raise ConfigError(f"the {name} of {what} must be {value!r}, got {config[name]!r}; others are not supported")


def _is_diffusion(config: Config) -> bool:
    return config.get("_class_name") == "CausalDiffusionVAE" or isinstance(config.get("decoder"), Mapping)


_SHORT = {kind: short for short, kind in _KINDS.items()}
_VIDEO_OPTIONS = {
    "dims": 3,
    "norm_layer": "pixel_norm",
    "latent_log_var": "uniform",
    "use_quant_conv": False,
    "normalize_latent_channels": False,
    "scaling_factor": 1.0,
}
