"""What this package is, without importing torch: the entry point of the registry."""

from fastvideo_vae_core.family import Component, Family, Layout

_PACKAGE = "fastvideo_vae_oobleck"

# A file may hold one half only, so each layout is recognised by either.
_DIFFUSERS = Layout(
    name="diffusers",
    markers=(("encoder.block.0.res_unit1.snake1.alpha", 3), ("decoder.block.0.snake1.alpha", 3)),
    prefixes=("vae.", ""),
    rules=f"{_PACKAGE}.checkpoint:diffusers_rules",
)
_OFFICIAL = Layout(
    name="stable-audio-tools",
    markers=(("encoder.layers.1.layers.0.layers.0.alpha", 1), ("decoder.layers.1.layers.0.alpha", 1)),
    # A full model, the same inside its trainer, an autoencoder inside its trainer, and the autoencoder alone.
    prefixes=("diffusion.pretransform.model.", "pretransform.model.", "autoencoder.", ""),
    rules=f"{_PACKAGE}.checkpoint:official_rules",
)

FAMILY = Family(
    name="oobleck",
    distribution="fastvideo-vae-oobleck",
    title="audio: Stable Audio Open, ACE-Step",
    components=(
        Component(
            media="audio",
            model=f"{_PACKAGE}.model:AutoencoderOobleck",
            arch=f"{_PACKAGE}.config:OobleckArchConfig",
            class_names=("AutoencoderOobleck", "OobleckVAE"),
            variants={
                "stable_audio_open": f"{_PACKAGE}.config:STABLE_AUDIO_OPEN",
                "ace_step": f"{_PACKAGE}.config:ACE_STEP",
            },
            layouts=(_DIFFUSERS, _OFFICIAL),
            infer=f"{_PACKAGE}.checkpoint:infer",
            official_config="model_config.json",
        ),
    ),
    demo="demo",
    demo_media="demo/recording.ogg",
)
