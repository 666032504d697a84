"""Names of the tensors in files, as tables, and what the tensors say of the architecture."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from fastvideo_vae_autoencoder_kl.config import FLUX1, SD1, SD3, SDXL, AutoencoderKLArchConfig
from fastvideo_vae_core.checkpoint import RenameTable, Rule
from fastvideo_vae_core.errors import CheckpointError
from fastvideo_vae_core.family import Evidence, Inferred

# diffusers before 0.17 named the attention's layers otherwise; repositories of Stable Diffusion 1.5 still do.
_LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LDM_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def diffusers_rules(names: Collection[str]) -> RenameTable:
    """The model's own names, and the old ones of the attention's layers."""
    legacy = [
        Rule(rf"(.+\.attentions\.\d+)\.{old}\.(weight|bias)", rf"\1.{new}.\2", reshape=True)
        for old, new in _LEGACY_ATTENTION.items()
    ]
    return RenameTable([*legacy, Rule(r"((?:encoder|decoder|quant_conv|post_quant_conv)\..+)", r"\1")])


def ldm_rules(names: Collection[str]) -> RenameTable:
    """CompVis' and Black Forest Labs' names. The decoder's levels count the other way round."""
    levels = 1 + max(
        (int(match[1]) for name in names if (match := re.match(r".+\.(?:down|up)\.(\d+)\.", name))), default=0
    )
    rules = []
    for level in range(levels):
        for old, new in (
            (rf"encoder\.down\.{level}", f"encoder.down_blocks.{level}"),
            (rf"decoder\.up\.{level}", f"decoder.up_blocks.{levels - 1 - level}"),
        ):
            rules += [
                *_block(rf"{old}\.block\.(\d+)", rf"{new}.resnets.\1"),
                *_attention(rf"{old}\.attn\.(\d+)", rf"{new}.attentions.\1"),
                Rule(rf"{old}\.downsample\.(.+)", rf"{new}.downsamplers.0.\1"),
                Rule(rf"{old}\.upsample\.(.+)", rf"{new}.upsamplers.0.\1"),
            ]
    half = r"(encoder|decoder)"
    return RenameTable(
        [
            *rules,
            *_block(rf"{half}\.mid\.block_1", r"\1.mid_block.resnets.0"),
            *_block(rf"{half}\.mid\.block_2", r"\1.mid_block.resnets.1"),
            *_attention(rf"{half}\.mid\.attn_1", r"\1.mid_block.attentions.0"),
            Rule(rf"{half}\.norm_out\.(.+)", r"\1.conv_norm_out.\2"),
            Rule(r"((?:encoder|decoder)\.conv_(?:in|out)\..+)", r"\1"),
            Rule(r"((?:post_)?quant_conv\..+)", r"\1"),
            # The discriminator and the moving averages of a training checkpoint.
            Rule(r"(?:loss|model_ema)\..+", None),
        ]
    )


def _block(old: str, new: str) -> list[Rule]:
    """A residual block: its layers keep their names but for the shortcut."""
    return [
        Rule(rf"{old}\.nin_shortcut\.(?P<leaf>.+)", rf"{new}.conv_shortcut.\g<leaf>"),
        Rule(rf"{old}\.(?P<leaf>(?:norm|conv)[12]\..+)", rf"{new}.\g<leaf>"),
    ]


def _attention(old: str, new: str) -> list[Rule]:
    """1x1 convolutions there, linear layers here."""
    return [
        Rule(rf"{old}\.{layer}\.(?P<leaf>.+)", rf"{new}.{ours}.\g<leaf>", reshape=True)
        for layer, ours in _LDM_ATTENTION.items()
    ]


def infer(evidence: Evidence) -> Inferred:
    """The architecture that the tensors have, and the published checkpoints it may be.

    Names of the other networks in a full checkpoint tell SD 1.x from SDXL and SD3 from FLUX.1, whose autoencoders have
    the same tensors but other scalings. So does the official file name `ae` of FLUX.1; nothing else is guessed.
    """
    shapes = evidence.shapes
    arch = _architecture(shapes)
    same = {
        name: constant
        for name, constant in {"sd1": SD1, "sdxl": SDXL, "sd3": SD3, "flux1": FLUX1}.items()
        if _without_scaling(constant) == _without_scaling(arch)
    }
    told = _told(evidence)
    variants = tuple(name for name in same if name == told) or tuple(same)
    return Inferred(arch=same[variants[0]] if variants else arch, variants=variants)


def _told(evidence: Evidence) -> str | None:
    beside = {
        "sd1": "cond_stage_model.",
        "sdxl": "conditioner.embedders.",
        "sd3": "model.diffusion_model.joint_blocks.",
        "flux1": "model.diffusion_model.double_blocks.",
    }
    for variant, prefix in beside.items():
        if any(name.startswith(prefix) for name in evidence.names):
            return variant
    return "flux1" if evidence.stem == "ae" and evidence.layout == "ldm" else None


def _architecture(shapes: Mapping[str, tuple[int, ...]]) -> AutoencoderKLArchConfig:
    """Read widths and depths off either half."""
    encoder = any(name.startswith("encoder.") for name in shapes)
    stem, block = ("encoder", "down_blocks") if encoder else ("decoder", "up_blocks")
    levels = _count(shapes, rf"{stem}\.{block}\.(\d+)\.")
    widths = [shapes.get(f"{stem}.{block}.{level}.resnets.0.conv1.weight", (0,))[0] for level in range(levels)]
    widths = widths if encoder else widths[::-1]
    layers = _count(shapes, rf"{stem}\.{block}\.0\.resnets\.(\d+)\.") - (0 if encoder else 1)
    latent = shapes["encoder.conv_out.weight"][0] // 2 if encoder else shapes["decoder.conv_in.weight"][1]
    picture = shapes["encoder.conv_in.weight"][1] if encoder else shapes["decoder.conv_out.weight"][0]
    attention = [any(f".{block}.{level}.attentions." in name for name in shapes) for level in range(levels)]
    attention = attention if encoder else attention[::-1]
    down = tuple("AttnDownEncoderBlock2D" if each else "DownEncoderBlock2D" for each in attention)
    up = tuple("AttnUpDecoderBlock2D" if each else "UpDecoderBlock2D" for each in reversed(attention))
    return AutoencoderKLArchConfig.from_dict(
        {
            "in_channels": picture,
            "out_channels": picture,
            "block_out_channels": widths,
            "down_block_types": down,
            "up_block_types": up,
            "layers_per_block": layers,
            "latent_channels": latent,
            "use_quant_conv": "quant_conv.weight" in shapes if encoder else "post_quant_conv.weight" in shapes,
            "use_post_quant_conv": "post_quant_conv.weight" in shapes
            if "decoder.conv_in.weight" in shapes
            else "quant_conv.weight" in shapes,
            "mid_block_add_attention": any(f"{stem}.mid_block.attentions." in name for name in shapes),
        }
    )


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    found = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
    if not found:
        raise CheckpointError(f"no tensor is named like {pattern}; the autoencoder is not whole")
    return max(found) + 1


def _without_scaling(arch: AutoencoderKLArchConfig) -> dict[str, object]:
    apart = ("scaling_factor", "shift_factor", "sample_size", "force_upcast")
    return {name: value for name, value in arch.to_dict().items() if name not in apart}
