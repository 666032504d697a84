"""What this package is, without importing torch: the entry point of the registry."""

from fastvideo_vae_core.family import Component, Family, Layout

_PACKAGE = "fastvideo_vae_autoencoder_kl"

# A file may hold one half only, so each layout is recognised by either.
_DIFFUSERS = Layout(
    name="diffusers",
    markers=(
        ("encoder.down_blocks.0.resnets.0.conv1.weight", 4),
        ("decoder.up_blocks.0.resnets.0.conv1.weight", 4),
    ),
    prefixes=("vae.", ""),
    rules=f"{_PACKAGE}.checkpoint:diffusers_rules",
)
_LDM = Layout(
    name="ldm",
    markers=(("encoder.down.0.block.0.norm1.weight", 1), ("decoder.up.0.block.0.norm1.weight", 1)),
    prefixes=("first_stage_model.", "vae.", ""),
    rules=f"{_PACKAGE}.checkpoint:ldm_rules",
)

FAMILY = Family(
    name="autoencoder_kl",
    distribution="fastvideo-vae-autoencoder-kl",
    title="image: Stable Diffusion 1.x, SDXL, SD3, FLUX.1",
    components=(
        Component(
            media="image",
            model=f"{_PACKAGE}.model:AutoencoderKL",
            arch=f"{_PACKAGE}.config:AutoencoderKLArchConfig",
            class_names=("AutoencoderKL",),
            variants={
                "sd1": f"{_PACKAGE}.config:SD1",
                "sdxl": f"{_PACKAGE}.config:SDXL",
                "sd3": f"{_PACKAGE}.config:SD3",
                "flux1": f"{_PACKAGE}.config:FLUX1",
            },
            layouts=(_DIFFUSERS, _LDM),
            infer=f"{_PACKAGE}.checkpoint:infer",
        ),
    ),
    demo="demo",
    demo_media="demo/photograph.jpg",
)
