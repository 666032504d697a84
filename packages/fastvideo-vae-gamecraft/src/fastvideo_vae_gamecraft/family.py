"""What this package is, without importing torch: the entry point of the registry."""

from fastvideo_vae_core.family import Component, Family, Layout

_PACKAGE = "fastvideo_vae_gamecraft"

# The official code and diffusers name the tensors alike. Some of these names image autoencoders have too, and others
# LTX-2; the shortcut of a level that changes the width is this family's alone. A file may hold one half only, so either
# half has its markers.
_LAYOUT = Layout(
    name="diffusers",
    markers=tuple(
        (f"{stem}.{level}.resnets.0.conv_shortcut.conv.weight", 5)
        for stem in ("encoder.down_blocks", "decoder.up_blocks")
        for level in range(1, 8)
    ),
    prefixes=("vae.", ""),
    rules=f"{_PACKAGE}.checkpoint:rules",
)

FAMILY = Family(
    name="gamecraft",
    distribution="fastvideo-vae-gamecraft",
    title="video: Hunyuan-GameCraft, HunyuanVideo",
    components=(
        Component(
            media="video",
            model=f"{_PACKAGE}.model:AutoencoderKLHunyuanVideo",
            arch=f"{_PACKAGE}.config:HunyuanVideoArchConfig",
            class_names=("AutoencoderKLHunyuanVideo", "AutoencoderKLCausal3D", "GameCraftVAE"),
            variants={"884-16c": f"{_PACKAGE}.config:GAMECRAFT"},
            layouts=(_LAYOUT,),
            infer=f"{_PACKAGE}.checkpoint:infer",
        ),
    ),
    demo="demo",
    demo_media="demo/clip.mp4",
)
