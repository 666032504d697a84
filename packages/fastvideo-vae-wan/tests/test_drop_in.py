"""diffusers' pipelines with tiny random parts give the same video with our autoencoder in the place of their own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvideo_vae_core.testing.golden import make_input
from fastvideo_vae_core.testing.threads import single_thread
from fastvideo_vae_wan import WAN21, WAN22, AutoencoderKLWan

diffusers = pytest.importorskip("diffusers", reason="this machine has no diffusers to drop into")

# Largest difference of a pixel in [0, 1]: float32, through two steps of denoising.
BOUND = 1e-5
FRAMES, HEIGHT, WIDTH = 9, 64, 96
PUBLISHED = {
    "wan2.1": replace(WAN21, base_dim=8, num_res_blocks=1),
    "wan2.2": replace(WAN22, base_dim=8, decoder_base_dim=12, num_res_blocks=1),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with single_thread():
        yield


@pytest.fixture(scope="module")
def vaes(random_model: Any, diffusers_twin: Any, request: pytest.FixtureRequest) -> tuple[AutoencoderKLWan, Any]:
    """Ours and diffusers', with the same weights."""
    ours = random_model(PUBLISHED[request.param])
    return ours, diffusers_twin(ours)


def of(*variants: str) -> Any:
    return pytest.mark.parametrize("vaes", variants, indirect=True)


def transformer(vae: Any, kind: str = "WanTransformer3DModel", *, conditions: int = 0, **options: Any) -> Any:
    """A tiny one; it takes `conditions` channels beside the latents."""
    torch.manual_seed(0)
    return getattr(diffusers, kind)(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=vae.config.z_dim + conditions,
        out_channels=vae.config.z_dim,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
        **options,
    ).eval()


def pipeline(kind: str, vae: Any, transformer: Any, **options: Any) -> Any:
    """A pipeline of diffusers. Text comes in as embeddings, so nothing is tokenized."""
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    with warnings.catch_warnings():
        # diffusers' registration does not know our class, which it may say.
        warnings.simplefilter("ignore")
        made = getattr(diffusers, kind)(
            vae=vae, transformer=transformer, scheduler=scheduler, tokenizer=None, text_encoder=None, **options
        )
    made.set_progress_bar_config(disable=True)
    return made


def same_video(build: Callable[[Any], Any], vaes: tuple[AutoencoderKLWan, Any], **call: Any) -> None:
    """Run the pipeline with either autoencoder and compare the videos."""
    videos = [
        build(vae)(
            prompt_embeds=make_input("prompt", (1, 7, 16), "latent"),
            negative_prompt_embeds=make_input("negative", (1, 7, 16), "latent"),
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=2,
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
            **call,
        ).frames
        for vae in vaes
    ]
    ours, theirs = videos
    assert ours.shape == theirs.shape == (1, FRAMES, 3, HEIGHT, WIDTH)
    # A video, and neither a plain one nor one that stands still.
    assert float(theirs.std()) > 0.01
    assert float(theirs.diff(dim=1).abs().max()) > 0.01
    assert float((ours - theirs).abs().max()) <= BOUND


def picture(name: str) -> Tensor:
    """An image in [0, 1], as pipelines take it."""
    return make_input(name, (1, 3, HEIGHT, WIDTH), "image") / 2 + 0.5


def clip() -> Tensor:
    """The frames of a video in [0, 1]."""
    return make_input("clip", (FRAMES, 3, HEIGHT, WIDTH), "image") / 2 + 0.5


@of("wan2.1", "wan2.2")
def test_text_to_video(vaes: Any) -> None:
    same_video(lambda vae: pipeline("WanPipeline", vae, transformer(vae)), vaes, num_frames=FRAMES)


@of("wan2.1")
@pytest.mark.parametrize("last", [False, True])
def test_image_to_video(vaes: Any, last: bool) -> None:
    """Wan 2.1: beside the latents stands a video that begins with the picture, and may end with another."""
    mask = vaes[0].config.scale_factor_temporal

    def build(vae: Any) -> Any:
        video = transformer(vae, conditions=mask + vae.config.z_dim)
        return pipeline("WanImageToVideoPipeline", vae, video, image_encoder=None, image_processor=None)

    ends = {"image": picture("first"), "last_image": picture("last") if last else None}
    same_video(build, vaes, **ends, num_frames=FRAMES)


@of("wan2.2")
def test_image_to_video_in_the_first_latents(vaes: Any) -> None:
    """Wan 2.2: the picture's latents stand in the place of the first ones."""

    def build(vae: Any) -> Any:
        absent = {"image_encoder": None, "image_processor": None}
        return pipeline("WanImageToVideoPipeline", vae, transformer(vae), expand_timesteps=True, **absent)

    same_video(build, vaes, image=picture("first"), num_frames=FRAMES)


@of("wan2.1")
def test_video_to_video(vaes: Any) -> None:
    """The encoder over a whole video."""
    same_video(
        lambda vae: pipeline("WanVideoToVideoPipeline", vae, transformer(vae)), vaes, video=clip()[None], strength=0.7
    )


@of("wan2.1")
def test_editing_under_a_mask(vaes: Any) -> None:
    """VACE: the latents of what the mask keeps and of what it does not, and the mask in the latents' cells."""

    def build(vae: Any) -> Any:
        cells = vae.config.scale_factor_spatial**2
        conditions = {"vace_layers": [0], "vace_in_channels": 2 * vae.config.z_dim + cells}
        return pipeline("WanVACEPipeline", vae, transformer(vae, "WanVACETransformer3DModel", **conditions))

    mask = torch.zeros(1, FRAMES, 3, HEIGHT, WIDTH)
    mask[..., 16:48, 32:80] = 1
    same_video(build, vaes, video=clip()[None], mask=mask, num_frames=FRAMES)


@of("wan2.1")
def test_slicing_and_exact_tiling_are_switched_on_by_the_pipelines_names(vaes: Any) -> None:
    ours, _ = vaes

    def build(vae: Any) -> Any:
        made = pipeline("WanPipeline", vae, transformer(vae))
        made.vae.enable_slicing()
        if vae is ours:
            made.vae.enable_tiling(32, 32)
            plan = ours.plan_decode((1, vae.config.z_dim, 3, HEIGHT // 8, WIDTH // 8))
            assert plan.tile == (FRAMES, 32, 32)
        return made

    same_video(build, vaes, num_frames=FRAMES)


@of("wan2.1", "wan2.2")
def test_names_that_pipelines_read(vaes: Any) -> None:
    ours, theirs = vaes
    assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
    for name in ("z_dim", "latents_mean", "latents_std", "scale_factor_temporal", "scale_factor_spatial", "patch_size"):
        value = getattr(ours.config, name)
        assert (list(value) if isinstance(value, tuple) else value) == _listed(getattr(theirs.config, name)), name
    # Pipelines for video to video ask the model itself.
    assert list(ours.temperal_downsample) == list(theirs.temperal_downsample)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value
