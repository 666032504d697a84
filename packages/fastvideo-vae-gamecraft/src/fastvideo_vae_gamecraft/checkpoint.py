"""Names of the tensors in files, as a table, and what the tensors say of the architecture."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from fastvideo_vae_core.checkpoint import RenameTable, Rule
from fastvideo_vae_core.errors import CheckpointError
from fastvideo_vae_core.family import Evidence, Inferred
from fastvideo_vae_gamecraft.config import GAMECRAFT, HunyuanVideoArchConfig


def rules(names: Collection[str]) -> RenameTable:
    """The model's own names, which the official code has too."""
    return RenameTable(
        [
            Rule(r"((?:encoder|decoder|quant_conv|post_quant_conv)\..+)", r"\1"),
            # What training leaves beside the autoencoder.
            Rule(r"(?:loss|discriminator|perceptual_loss|model_ema)\..+", None),
        ]
    )


def infer(evidence: Evidence) -> Inferred:
    """The architecture that the tensors have, and whether it is the published one.

    No tensor says how the attention is masked or how latents are scaled; both are taken to be as published.
    """
    arch = _architecture(evidence.shapes)
    return Inferred(arch=arch, variants=("884-16c",) if arch == GAMECRAFT else ())


def _architecture(shapes: Mapping[str, tuple[int, ...]]) -> HunyuanVideoArchConfig:
    """Read widths and depths off either half."""
    encoder = "encoder.conv_in.conv.weight" in shapes
    if not encoder and "decoder.conv_in.conv.weight" not in shapes:
        raise CheckpointError("neither encoder.conv_in nor decoder.conv_in is there; the autoencoder is not whole")
    stem, block, sampler = (
        ("encoder", "down_blocks", "downsamplers") if encoder else ("decoder", "up_blocks", "upsamplers")
    )
    levels = _count(shapes, rf"{stem}\.{block}\.(\d+)\.")
    widths = [shapes.get(f"{stem}.{block}.{level}.resnets.0.conv1.conv.weight", (0,))[0] for level in range(levels)]
    layers = _count(shapes, rf"{stem}\.{block}\.0\.resnets\.(\d+)\.") - (0 if encoder else 1)
    latent = shapes["encoder.conv_out.conv.weight"][0] // 2 if encoder else shapes["decoder.conv_in.conv.weight"][1]
    picture = shapes["encoder.conv_in.conv.weight"][1] if encoder else shapes["decoder.conv_out.conv.weight"][0]
    # Which levels halve the frames and which the picture follows from how many there are; the first level always
    # halves the picture.
    samplers = sum(f"{stem}.{block}.{level}.{sampler}.0.conv.conv.weight" in shapes for level in range(levels))
    return HunyuanVideoArchConfig.from_dict(
        {
            "in_channels": picture,
            "out_channels": picture,
            "latent_channels": latent,
            "block_out_channels": widths if encoder else widths[::-1],
            "down_block_types": ("HunyuanVideoDownBlock3D",) * levels,
            "up_block_types": ("HunyuanVideoUpBlock3D",) * levels,
            "layers_per_block": layers,
            "spatial_compression_ratio": 1 << samplers,
            "norm_num_groups": GAMECRAFT.norm_num_groups,
            "mid_block_add_attention": any(f"{stem}.mid_block.attentions." in name for name in shapes),
        }
    )


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    found = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
    if not found:
        raise CheckpointError(f"no tensor is named like {pattern}; the autoencoder is not whole")
    return max(found) + 1
