"""diffusers' pipelines give the same video with our autoencoder in the place of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvideo_vae_core.testing.golden import make_input
from fastvideo_vae_core.testing.threads import single_thread
from fastvideo_vae_gamecraft import DIFFUSERS_FRAMEWISE, HUNYUANVIDEO

diffusers = pytest.importorskip("diffusers", reason="this machine has no diffusers to drop into")

# Largest difference of a pixel in [0, 1]: float32, through a few steps of denoising.
BOUND = 1e-5
HEIGHT, WIDTH = 32, 48
ARCH = replace(HUNYUANVIDEO, block_out_channels=(8, 16, 16, 24), norm_num_groups=4, layers_per_block=1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with single_thread():
        yield


@pytest.fixture
def vaes(random_model: Any, diffusers_twin: Any) -> tuple[Any, Any]:
    """Ours and diffusers', with the same weights."""
    ours = random_model(ARCH)
    return ours, diffusers_twin(ours)


def pipeline(kind: str, vae: Any, channels: int) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=channels,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=24,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    ).eval()
    made = getattr(diffusers, kind)(
        vae=vae,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    made.set_progress_bar_config(disable=True)
    return made


def video_of(kind: str, vae: Any, frames: int, **options: Any) -> Tensor:
    """A video in [0, 1] from two steps of denoising."""
    video: Tensor = pipeline(kind, vae, 16 if kind == "HunyuanVideoPipeline" else 32)(
        height=HEIGHT,
        width=WIDTH,
        num_frames=frames,
        num_inference_steps=2,
        prompt_embeds=make_input("prompt", (1, 7, 24), "latent"),
        pooled_prompt_embeds=make_input("pooled", (1, 8), "latent"),
        prompt_attention_mask=torch.ones(1, 7),
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **options,
    ).frames
    return video


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    # A video, and not a plain one.
    assert float(theirs.std()) > 0.01
    assert float((ours - theirs).abs().max()) <= BOUND


@pytest.mark.parametrize("frames", [1, 9, 21])
def test_text_to_video(vaes: Any, frames: int) -> None:
    ours, theirs = (video_of("HunyuanVideoPipeline", vae, frames) for vae in vaes)
    assert ours.shape == (1, frames, 3, HEIGHT, WIDTH)
    assert_same(ours, theirs)


def test_diffusers_defaults_can_be_had(vaes: Any) -> None:
    """It blends tiles in time from 17 frames on, unless it is told otherwise. That is another video, and ours to have
    by name."""
    ours, theirs = vaes
    whole = video_of("HunyuanVideoPipeline", ours, 21)
    theirs.use_framewise_decoding = True
    ours.enable_blending(DIFFUSERS_FRAMEWISE)
    blended, expected = (video_of("HunyuanVideoPipeline", vae, 21) for vae in vaes)
    assert_same(blended, expected)
    assert float((whole - expected).abs().max()) > 100 * BOUND


def test_exact_tiles_are_switched_on_by_the_pipelines_names(vaes: Any) -> None:
    ours, theirs = vaes
    expected = video_of("HunyuanVideoPipeline", theirs, 9)
    ours.enable_tiling(24, 16)
    ours.enable_slicing()
    assert ours.plan_decode((1, 16, 3, HEIGHT // 8, WIDTH // 8)).tile == (9, 24, 16)
    assert_same(video_of("HunyuanVideoPipeline", ours, 9), expected)


def test_image_to_video(vaes: Any) -> None:
    """SkyReels' pipeline: the encoder and the mode of its posterior too."""
    image = make_input("drop-in", (1, 3, HEIGHT, WIDTH), "image") / 2 + 0.5
    ours, theirs = (video_of("HunyuanSkyreelsImageToVideoPipeline", vae, 9, image=image) for vae in vaes)
    assert_same(ours, theirs)
