"""What this package is, without importing torch: the entry point of the registry."""

from fastvideo_vae_core.family import Component, Family, Layout

_PACKAGE = "fastvideo_vae_wan"

# A file may hold one half only, so each layout is recognised by either.
_DIFFUSERS = Layout(
    name="diffusers",
    markers=(("encoder.mid_block.resnets.0.norm1.gamma", 4), ("decoder.mid_block.resnets.0.norm1.gamma", 4)),
    prefixes=("vae.", ""),
)
_OFFICIAL = Layout(
    name="wan",
    markers=(("encoder.middle.0.residual.0.gamma", 4), ("decoder.middle.0.residual.0.gamma", 4)),
    prefixes=("vae.", ""),
    rules=f"{_PACKAGE}.checkpoint:official_rules",
)

FAMILY = Family(
    name="wan",
    distribution="fastvideo-vae-wan",
    title="video: Wan 2.1, Wan 2.2",
    components=(
        Component(
            media="video",
            model=f"{_PACKAGE}.model:AutoencoderKLWan",
            arch=f"{_PACKAGE}.config:WanArchConfig",
            class_names=("AutoencoderKLWan", "WanVAE", "WanVAE_", "Wan2_1_VAE", "Wan2_2_VAE"),
            variants={"wan2.1": f"{_PACKAGE}.config:WAN21", "wan2.2": f"{_PACKAGE}.config:WAN22"},
            layouts=(_DIFFUSERS, _OFFICIAL),
            infer=f"{_PACKAGE}.checkpoint:infer",
        ),
    ),
    demo="demo",
    demo_media="demo/clip.mp4",
)
