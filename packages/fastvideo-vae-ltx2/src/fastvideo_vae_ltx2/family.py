"""What this package is, without importing torch: the entry point of the registry."""

from fastvideo_vae_core.family import Component, Family, Layout, Waveforms

_PACKAGE = "fastvideo_vae_ltx2"

# A file may hold one half only, so each layout is recognised by either. Other video autoencoders have blocks of the
# same names, but their norms have weights.
_VIDEO = (
    Layout(
        name="diffusers",
        markers=(
            ("encoder.mid_block.resnets.0.conv1.conv.weight", 5),
            ("decoder.mid_block.resnets.0.conv1.conv.weight", 5),
        ),
        unlike=("encoder.mid_block.resnets.0.norm1.weight", "decoder.mid_block.resnets.0.norm1.weight"),
        prefixes=("vae.", ""),
    ),
    Layout(
        name="ltx",
        markers=(
            ("encoder.down_blocks.0.res_blocks.0.conv1.conv.weight", 5),
            ("decoder.up_blocks.0.res_blocks.0.conv1.conv.weight", 5),
            # The diffusion decoder of LTX-2.5, which is refused by name.
            ("decoder.upsamples.0.proj.weight", 2),
        ),
        prefixes=("vae.", ""),
        rules=f"{_PACKAGE}.checkpoint:video_rules",
    ),
)
# diffusers has the official names, but for the statistics.
_AUDIO = (
    Layout(
        name="ltx",
        markers=(("encoder.mid.block_1.conv1.conv.weight", 4), ("decoder.mid.block_1.conv1.conv.weight", 4)),
        prefixes=("audio_vae.", ""),
        rules=f"{_PACKAGE}.checkpoint:audio_rules",
    ),
)
_VOCODER = (
    Layout(
        name="diffusers",
        markers=(("resnets.0.convs1.0.weight", 3), ("vocoder.resnets.0.convs1.0.weight", 3)),
        rules=f"{_PACKAGE}.checkpoint:diffusers_vocoder_rules",
    ),
    # With bandwidth extension a name behind the prefix may begin with the prefix once more, so it comes first.
    Layout(
        name="ltx",
        markers=(("bwe_generator.resblocks.0.convs1.0.weight", 3),),
        prefixes=("vocoder.", ""),
        rules=f"{_PACKAGE}.checkpoint:vocoder_rules",
    ),
    Layout(
        name="ltx",
        markers=(("resblocks.0.convs1.0.weight", 3),),
        prefixes=("vocoder.", ""),
        rules=f"{_PACKAGE}.checkpoint:vocoder_rules",
    ),
)

FAMILY = Family(
    name="ltx2",
    distribution="fastvideo-vae-ltx2",
    title="video and audio: LTX-2, LTX-2.3",
    components=(
        Component(
            name="video",
            media="video",
            model=f"{_PACKAGE}.model:AutoencoderKLLTX2Video",
            arch=f"{_PACKAGE}.config:LTX2VideoArchConfig",
            class_names=("AutoencoderKLLTX2Video", "CausalVideoAutoencoder", "LTX2CausalVideoAutoencoder"),
            variants={
                "ltx2.0": f"{_PACKAGE}.config:LTX20_VIDEO",
                "ltx2.0-timed": f"{_PACKAGE}.config:LTX20_VIDEO_TIMED",
                "ltx2.3": f"{_PACKAGE}.config:LTX23_VIDEO",
            },
            layouts=_VIDEO,
            infer=f"{_PACKAGE}.checkpoint:infer_video",
            sound="audio",
        ),
        Component(
            name="audio",
            media="audio",
            model=f"{_PACKAGE}.audio:AutoencoderKLLTX2Audio",
            arch=f"{_PACKAGE}.config:LTX2AudioArchConfig",
            class_names=("AutoencoderKLLTX2Audio", "LTX2AudioEncoder", "LTX2AudioDecoder"),
            variants={"ltx2": f"{_PACKAGE}.config:LTX2_AUDIO"},
            layouts=_AUDIO,
            infer=f"{_PACKAGE}.checkpoint:infer_audio",
            folder="audio_vae",
            waveforms=Waveforms(
                vocoder="vocoder",
                encoder=f"{_PACKAGE}.sound:WaveformEncoder",
                decoder=f"{_PACKAGE}.sound:WaveformDecoder",
            ),
        ),
        Component(
            name="vocoder",
            media="audio",
            model=f"{_PACKAGE}.vocoder:LTX2Vocoder",
            arch=f"{_PACKAGE}.config:LTX2VocoderArchConfig",
            class_names=("LTX2Vocoder", "LTX2VocoderWithBWE"),
            variants={"ltx2.0": f"{_PACKAGE}.config:LTX20_VOCODER", "ltx2.3": f"{_PACKAGE}.config:LTX23_VOCODER"},
            layouts=_VOCODER,
            infer=f"{_PACKAGE}.checkpoint:infer_vocoder",
            folder="vocoder",
        ),
    ),
    demo="demo/vae",
    demo_media="demo/clip.mp4",
)
