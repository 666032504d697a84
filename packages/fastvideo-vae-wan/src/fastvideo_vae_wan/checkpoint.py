"""Names of the tensors in files, as tables, and what the tensors say of the architecture."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch

from fastvideo_vae_core.checkpoint import RenameTable, Rule
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.errors import CheckpointError
from fastvideo_vae_core.family import Evidence, Inferred
from fastvideo_vae_wan.config import WAN21, WAN22, WanArchConfig

_HALF = r"(?P<half>encoder|decoder)"
_RESAMPLE = r"(?P<leaf>(?:resample\.1|time_conv)\.(?:weight|bias))"


def official_rules(names: Collection[str]) -> RenameTable:
    """Wan's own names. Its decoder of 2.1 counts all parts of all levels in one list, which `stride` undoes."""
    stride = 1 + min((int(found[1]) for name in names if (found := _UP_SAMPLER.match(name))), default=0)
    levels = range(1 + max((int(found[1]) for name in names if (found := _UP.match(name))), default=0) // stride)
    flat = []
    for level in levels:
        for part in range(stride - 1):
            flat += _block(rf"decoder\.upsamples\.{level * stride + part}", f"decoder.up_blocks.{level}.resnets.{part}")
        sampler = rf"decoder\.upsamples\.{level * stride + stride - 1}"
        flat.append(Rule(rf"{sampler}\.{_RESAMPLE}", rf"decoder.up_blocks.{level}.upsamplers.0.\g<leaf>"))
    return RenameTable(
        [
            *flat,
            # Wan 2.1.
            *_block(r"encoder\.downsamples\.(?P<n>\d+)", r"encoder.down_blocks.\g<n>"),
            Rule(rf"encoder\.downsamples\.(?P<n>\d+)\.{_RESAMPLE}", r"encoder.down_blocks.\g<n>.\g<leaf>"),
            # Wan 2.2, whose samplers stand behind the residual blocks of their level.
            *_block(
                r"encoder\.downsamples\.(?P<level>\d+)\.downsamples\.(?P<n>\d+)",
                r"encoder.down_blocks.\g<level>.resnets.\g<n>",
            ),
            *_block(
                r"decoder\.upsamples\.(?P<level>\d+)\.upsamples\.(?P<n>\d+)",
                r"decoder.up_blocks.\g<level>.resnets.\g<n>",
            ),
            Rule(
                rf"encoder\.downsamples\.(?P<level>\d+)\.downsamples\.\d+\.{_RESAMPLE}",
                r"encoder.down_blocks.\g<level>.downsampler.\g<leaf>",
            ),
            Rule(
                rf"decoder\.upsamples\.(?P<level>\d+)\.upsamples\.\d+\.{_RESAMPLE}",
                r"decoder.up_blocks.\g<level>.upsampler.\g<leaf>",
            ),
            # Both.
            *_block(rf"{_HALF}\.middle\.0", r"\g<half>.mid_block.resnets.0"),
            *_block(rf"{_HALF}\.middle\.2", r"\g<half>.mid_block.resnets.1"),
            Rule(rf"{_HALF}\.middle\.1\.(?P<leaf>.+)", r"\g<half>.mid_block.attentions.0.\g<leaf>"),
            Rule(rf"{_HALF}\.conv1\.(?P<leaf>.+)", r"\g<half>.conv_in.\g<leaf>"),
            Rule(rf"{_HALF}\.head\.0\.gamma", r"\g<half>.norm_out.gamma"),
            Rule(rf"{_HALF}\.head\.2\.(?P<leaf>.+)", r"\g<half>.conv_out.\g<leaf>"),
            Rule(r"conv1\.(.+)", r"quant_conv.\1"),
            Rule(r"conv2\.(.+)", r"post_quant_conv.\1"),
        ]
    )


_UP = re.compile(r"decoder\.upsamples\.(\d+)\.(?:residual|resample|shortcut|time_conv)\.")
_UP_SAMPLER = re.compile(r"decoder\.upsamples\.(\d+)\.resample\.")


def _block(old: str, new: str) -> list[Rule]:
    """A residual block."""
    return [
        Rule(rf"{old}\.residual\.0\.gamma", rf"{new}.norm1.gamma"),
        Rule(rf"{old}\.residual\.2\.(?P<leaf>.+)", rf"{new}.conv1.\g<leaf>"),
        Rule(rf"{old}\.residual\.3\.gamma", rf"{new}.norm2.gamma"),
        Rule(rf"{old}\.residual\.6\.(?P<leaf>.+)", rf"{new}.conv2.\g<leaf>"),
        Rule(rf"{old}\.shortcut\.(?P<leaf>.+)", rf"{new}.conv_shortcut.\g<leaf>"),
    ]


def infer(evidence: Evidence) -> Inferred:
    """The architecture that the tensors have, and the published checkpoint it is.

    No file holds the statistics of the latents. Other networks with as many latent channels as a published one are
    taken to share its latent space, which pruned and distilled copies do; the rest are left un-normalised.
    """
    for variant, constant in {"wan2.1": WAN21, "wan2.2": WAN22}.items():
        if _fits(constant, evidence.shapes):
            return Inferred(arch=constant, variants=(variant,))
    return Inferred(arch=_architecture(evidence.shapes))


def _fits(arch: WanArchConfig, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether every tensor of the halves that are there is one of this network's, as it is."""
    from fastvideo_vae_wan.model import AutoencoderKLWan

    with torch.device("meta"):
        expected = AutoencoderKLWan(VAEConfig(arch_config=arch)).state_dict()
    return all(name in expected and tuple(expected[name].shape) == shape for name, shape in shapes.items())


def _architecture(shapes: Mapping[str, tuple[int, ...]]) -> WanArchConfig:
    """Read widths and depths off either half."""
    residual = any(re.match(r"encoder\.down_blocks\.\d+\.resnets\.|decoder\..+\.upsampler\.", name) for name in shapes)
    if "encoder.conv_in.weight" in shapes:
        widths, temporal, blocks = _encoder_levels(shapes, residual)
        base, pictures = shapes["encoder.conv_in.weight"][:2]
        z = shapes["encoder.conv_out.weight"][0] // 2
    elif "decoder.conv_out.weight" in shapes:
        widths, temporal, blocks = _decoder_levels(shapes)
        pictures, base = shapes["decoder.conv_out.weight"][:2]
        z = shapes["decoder.conv_in.weight"][1]
    else:
        raise CheckpointError("neither encoder.conv_in nor decoder.conv_out is there; the autoencoder is not whole")
    known = {each.z_dim: each for each in (WAN21, WAN22)}.get(z)
    return WanArchConfig.from_dict(
        {
            "base_dim": base,
            "decoder_base_dim": shapes.get("decoder.conv_out.weight", (0, base))[1] if residual else None,
            "z_dim": z,
            "dim_mult": [width // base for width in widths],
            "num_res_blocks": blocks,
            "temperal_downsample": temporal,
            "is_residual": residual,
            "in_channels": pictures,
            "out_channels": pictures,
            "patch_size": 2 if residual and pictures % 4 == 0 else None,
            "latents_mean": known.latents_mean if known else [0.0] * z,
            "latents_std": known.latents_std if known else [1.0] * z,
        }
    )


def _encoder_levels(shapes: Mapping[str, tuple[int, ...]], residual: bool) -> tuple[list[int], list[bool], int]:
    """Widths of the levels, whether each but the last halves the frames, and residual blocks in a level."""
    stem = "encoder.down_blocks"
    if residual:
        levels = range(_count(shapes, rf"{stem}\.(\d+)\."))
        widths = [shapes[f"{stem}.{level}.resnets.0.conv1.weight"][0] for level in levels]
        temporal = [f"{stem}.{level}.downsampler.time_conv.weight" in shapes for level in levels[:-1]]
        return widths, temporal, _count(shapes, rf"{stem}\.0\.resnets\.(\d+)\.")
    parts = range(_count(shapes, rf"{stem}\.(\d+)\."))
    samplers = [part for part in parts if f"{stem}.{part}.resample.1.weight" in shapes]
    widths = [shapes[f"{stem}.{part + 1}.conv1.weight"][0] for part in (-1, *samplers)]
    temporal = [f"{stem}.{part}.time_conv.weight" in shapes for part in samplers]
    return widths, temporal, samplers[0] if samplers else len(parts)


def _decoder_levels(shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[int], list[bool], int]:
    """The same, read off the decoder: the finest level first, as in the encoder."""
    stem = "decoder.up_blocks"
    levels = range(_count(shapes, rf"{stem}\.(\d+)\."))[::-1]
    widths = [shapes[f"{stem}.{level}.resnets.0.conv1.weight"][0] for level in levels]
    temporal = [
        any(f"{stem}.{level}.{name}.time_conv.weight" in shapes for name in ("upsamplers.0", "upsampler"))
        for level in levels[1:]
    ]
    return widths, temporal, _count(shapes, rf"{stem}\.0\.resnets\.(\d+)\.") - 1


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    found = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
    if not found:
        raise CheckpointError(f"no tensor is named like {pattern}; the autoencoder is not whole")
    return max(found) + 1
