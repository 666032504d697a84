"""Names of the tensors in files, as tables, and what files say of the architecture."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from fastvideo_vae_core.checkpoint import RenameTable, Rule
from fastvideo_vae_core.config import VAEArchConfig, VAEConfig
from fastvideo_vae_core.errors import CheckpointError
from fastvideo_vae_core.family import Evidence, Inferred, load_object
from fastvideo_vae_ltx2 import config as configs
from fastvideo_vae_ltx2 import official
from fastvideo_vae_ltx2.config import LTX2AudioArchConfig, LTX2VideoArchConfig, LTX2VocoderArchConfig

_LEAF = r"(?P<leaf>.+)"
_STATISTICS = [
    Rule(r"per_channel_statistics\.mean-of-means", "latents_mean"),
    Rule(r"per_channel_statistics\.std-of-means", "latents_std"),
    # What published files have besides, and nothing reads.
    Rule(r"per_channel_statistics\..+", None),
]
# The kind of tensor of LTX-2.5's decoder that no other has.
_DIFFUSION = "decoder.upsamples."


def video_rules(names: Collection[str]) -> RenameTable:
    """The official names, which count levels and changes of resolution in one list."""
    down, up = (_count(names, f"{half}_blocks.") for half in ("encoder.down", "decoder.up"))
    rules = [*_STATISTICS]
    for index in range(down):
        level, odd = divmod(index, 2)
        old, new = rf"encoder\.down_blocks\.{index}", f"encoder.down_blocks.{level}"
        if odd:
            rules.append(Rule(rf"{old}\.conv\.{_LEAF}", rf"{new}.downsamplers.0.conv.\g<leaf>"))
        else:
            rules.append(
                Rule(
                    rf"{old}\.res_blocks\.{_LEAF}",
                    rf"{'encoder.mid_block' if index == down - 1 else new}.resnets.\g<leaf>",
                )
            )
    for index in range(up):
        level, even = divmod(index + 1, 2)
        old = rf"decoder\.up_blocks\.{index}"
        new = f"decoder.up_blocks.{level - 1}" if index else "decoder.mid_block"
        if even:
            rules.append(Rule(rf"{old}\.res_blocks\.{_LEAF}", rf"{new}.resnets.\g<leaf>"))
            rules.append(Rule(rf"{old}\.time_embedder\.{_LEAF}", rf"{new}.time_embedder.\g<leaf>"))
        else:
            rules.append(Rule(rf"{old}\.conv\.{_LEAF}", rf"{new}.upsamplers.0.conv.\g<leaf>"))
    return RenameTable(
        [
            *rules,
            Rule(rf"decoder\.last_time_embedder\.{_LEAF}", r"decoder.time_embedder.\g<leaf>"),
            Rule(r"decoder\.last_scale_shift_table", "decoder.scale_shift_table"),
            Rule(r"((?:encoder|decoder)\.conv_(?:in|out)\..+)", r"\1"),
            Rule(r"(decoder\.timestep_scale_multiplier)", r"\1"),
        ]
    )


def audio_rules(names: Collection[str]) -> RenameTable:
    """The official names, which but for the statistics are the model's own."""
    return RenameTable([*_STATISTICS, Rule(r"((?:encoder|decoder|latents_mean|latents_std)\b.*)", r"\1")])


def vocoder_rules(names: Collection[str]) -> RenameTable:
    """The official names; each of the two generators stands behind its own where the bandwidth is extended."""
    stage = r"(?P<stage>(?:(?:vocoder|bwe_generator)\.)?)"
    return RenameTable(
        [
            *_UNREAD,
            Rule(rf"{stage}conv_pre\.{_LEAF}", r"\g<stage>conv_in.\g<leaf>"),
            Rule(rf"{stage}conv_post\.{_LEAF}", r"\g<stage>conv_out.\g<leaf>"),
            Rule(rf"{stage}ups\.{_LEAF}", r"\g<stage>upsamplers.\g<leaf>"),
            Rule(
                rf"{stage}resblocks\.(?P<place>.+)\.downsample\.lowpass\.filter",
                r"\g<stage>resnets.\g<place>.downsample.filter",
            ),
            Rule(rf"{stage}resblocks\.{_LEAF}", r"\g<stage>resnets.\g<leaf>"),
            Rule(rf"{stage}act_post\.downsample\.lowpass\.filter", r"\g<stage>act_out.downsample.filter"),
            Rule(rf"{stage}act_post\.{_LEAF}", r"\g<stage>act_out.\g<leaf>"),
            Rule(r"(mel_stft\..+)", r"\1"),
        ]
    )


def diffusers_vocoder_rules(names: Collection[str]) -> RenameTable:
    """The model's own names, and a buffer that nothing reads."""
    return RenameTable([*_UNREAD, Rule(r"(.+)", r"\1")])


_UNREAD = [Rule(r"mel_stft\.stft_fn\.inverse_basis", None)]


def infer_video(evidence: Evidence) -> Inferred:
    """The architecture that the metadata tells, or else the published checkpoint that has these tensors.

    Raises:
        ConfigError: it is LTX-2.5, or the metadata describes another network.
        CheckpointError: there is no metadata, and it is no published checkpoint.
    """
    if any(name.startswith(evidence.prefix + _DIFFUSION) for name in evidence.names):
        raise official.refuse_diffusion()
    section = official.from_metadata(evidence.metadata).get("vae")
    if section is not None:
        timed = "decoder.timestep_scale_multiplier" in evidence.shapes
        # The official code takes a decoder for conditioned where the file does not say; the tensors know better.
        arch = LTX2VideoArchConfig.from_dict(official.video({"timestep_conditioning": timed, **section}))
        return _named(arch, _VIDEO)
    return _published(evidence, _VIDEO, "fastvideo_vae_ltx2.model:AutoencoderKLLTX2Video")


def infer_audio(evidence: Evidence) -> Inferred:
    """The same, of an audio autoencoder."""
    section = official.from_metadata(evidence.metadata).get("audio_vae")
    if section is not None:
        return _named(LTX2AudioArchConfig.from_dict({"audio_vae": section}), _AUDIO)
    return _published(evidence, _AUDIO, "fastvideo_vae_ltx2.audio:AutoencoderKLLTX2Audio")


def infer_vocoder(evidence: Evidence) -> Inferred:
    """The same, of a vocoder."""
    section = official.from_metadata(evidence.metadata).get("vocoder")
    if section is not None:
        return _named(LTX2VocoderArchConfig.from_dict({"vocoder": section}), _VOCODER)
    return _published(evidence, _VOCODER, "fastvideo_vae_ltx2.vocoder:LTX2Vocoder")


def _named(arch: VAEArchConfig, variants: Mapping[str, VAEArchConfig]) -> Inferred:
    return Inferred(arch=arch, variants=tuple(name for name, constant in variants.items() if constant == arch))


def _published(evidence: Evidence, variants: Mapping[str, VAEArchConfig], model: str) -> Inferred:
    """The variant whose tensors these are: all of the halves that are there, as they are."""
    for name, arch in variants.items():
        with torch.device("meta"):
            expected = load_object(model)(VAEConfig(arch_config=arch)).state_dict()
        if all(key in expected and tuple(expected[key].shape) == shape for key, shape in evidence.shapes.items()):
            timed = getattr(arch, "timestep_conditioning", False)
            if timed and "decoder.timestep_scale_multiplier" not in evidence.shapes:
                continue
            return Inferred(arch=arch, variants=(name,))
    raise CheckpointError(
        f"{evidence.stem} has neither a configuration in its metadata nor the tensors of {' or '.join(variants)}; pass"
        " config="
    )


def _count(names: Collection[str], stem: str) -> int:
    """How many blocks the list behind that name has."""
    found = [int(name.removeprefix(stem).partition(".")[0]) for name in names if name.startswith(stem)]
    return max(found, default=-1) + 1


_VIDEO = {"ltx2.0": configs.LTX20_VIDEO, "ltx2.0-timed": configs.LTX20_VIDEO_TIMED, "ltx2.3": configs.LTX23_VIDEO}
_AUDIO = {"ltx2": configs.LTX2_AUDIO}
_VOCODER = {"ltx2.0": configs.LTX20_VOCODER, "ltx2.3": configs.LTX23_VOCODER}
