"""diffusers' pipelines give the same image with our autoencoder in the place of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvideo_vae_autoencoder_kl import FLUX1, SD1, SD3, SDXL, AutoencoderKL
from fastvideo_vae_core.testing.golden import make_input
from fastvideo_vae_core.testing.threads import single_thread

diffusers = pytest.importorskip("diffusers", reason="this machine has no diffusers to drop into")
transformers = pytest.importorskip("transformers", reason="this machine has no transformers for the text encoders")

# Largest difference of a pixel in [0, 1]: float32, through a few steps of denoising.
BOUND = 1e-5
# 16 x 16 latents of 128 x 128 pixels.
PIXELS = 128
NARROW: dict[str, Any] = {"block_out_channels": (8, 16, 16, 24), "norm_num_groups": 4, "layers_per_block": 1}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with single_thread():
        yield


@pytest.fixture
def vaes(random_model: Any, diffusers_twin: Any, request: pytest.FixtureRequest) -> tuple[AutoencoderKL, Any]:
    """Ours and diffusers', with the same weights."""
    ours = random_model(replace(request.param, **NARROW))
    return ours, diffusers_twin(ours)


def of(*archs: Any) -> Any:
    return pytest.mark.parametrize("vaes", archs, indirect=True, ids=lambda _: "")


@pytest.fixture
def text_parts(tmp_path: Path) -> dict[str, Any]:
    """A CLIP text encoder with random weights, and a tokenizer whose vocabulary is single characters."""
    characters = [chr(code) for code in range(33, 127)]
    vocabulary = [*characters, *(f"{each}</w>" for each in characters), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=16
    )
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=16,
        bos_token_id=len(vocabulary) - 2,
        eos_token_id=len(vocabulary) - 1,
    )
    torch.manual_seed(0)
    return {"tokenizer": tokenizer, "text_encoder": transformers.CLIPTextModel(config).eval()}


def unet(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "sample_size": PIXELS // 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return diffusers.UNet2DConditionModel(**sizes, **options).eval()


def stable_diffusion(kind: str, vae: Any, text_parts: dict[str, Any]) -> Any:
    return getattr(diffusers, kind)(
        vae=vae,
        unet=unet(),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **text_parts,
    )


def same_image(build: Callable[[Any], Any], vaes: tuple[AutoencoderKL, Any], **call: Any) -> None:
    """Run the pipeline with either autoencoder and compare the images."""
    images = []
    for vae in vaes:
        pipeline = build(vae)
        pipeline.set_progress_bar_config(disable=True)
        made = pipeline(num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0), **call)
        images.append(made.images)
    ours, theirs = images
    assert ours.shape == theirs.shape
    # An image, and not a plain one.
    assert float(theirs.std()) > 0.01
    assert float((ours - theirs).abs().max()) <= BOUND


def picture() -> Tensor:
    """An image in [0, 1], as pipelines take it."""
    return make_input("drop-in", (1, 3, PIXELS, PIXELS), "image") / 2 + 0.5


@of(SD1)
class TestStableDiffusion:
    def test_text_to_image(self, vaes: Any, text_parts: Any) -> None:
        def build(vae: Any) -> Any:
            return stable_diffusion("StableDiffusionPipeline", vae, text_parts)

        same_image(build, vaes, prompt=["a cat", "a dog"], height=PIXELS, width=PIXELS)

    def test_image_to_image(self, vaes: Any, text_parts: Any) -> None:
        """The encoder and a sample of its posterior too."""

        def build(vae: Any) -> Any:
            return stable_diffusion("StableDiffusionImg2ImgPipeline", vae, text_parts)

        same_image(build, vaes, prompt="a cat", image=picture(), strength=0.75)

    def test_inpainting(self, vaes: Any, text_parts: Any) -> None:
        def build(vae: Any) -> Any:
            return stable_diffusion("StableDiffusionInpaintPipeline", vae, text_parts)

        mask = torch.zeros(1, 1, PIXELS, PIXELS)
        mask[..., 32:96, 32:96] = 1
        same_image(build, vaes, prompt="a cat", image=picture(), mask_image=mask, height=PIXELS, width=PIXELS)

    def test_slicing_and_exact_tiling_are_switched_on_by_the_pipelines_names(self, vaes: Any, text_parts: Any) -> None:
        ours, _ = vaes

        def build(vae: Any) -> Any:
            pipeline = stable_diffusion("StableDiffusionPipeline", vae, text_parts)
            pipeline.vae.enable_slicing()
            if vae is ours:
                pipeline.vae.enable_tiling(64, 32)
                assert ours.plan_decode((2, 4, PIXELS // 8, PIXELS // 8)).tile == (64, 32)
            return pipeline

        same_image(build, vaes, prompt=["a cat", "a dog"], height=PIXELS, width=PIXELS)


@of(
    replace(SDXL, force_upcast=False),
    replace(SDXL, latents_mean=(0.1, -0.2, 0.3, -0.4), latents_std=(1.0, 2.0, 3.0, 4.0)),
)
class TestStableDiffusionXL:
    @pytest.mark.parametrize("kind", ["StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"])
    def test_it_gives_the_same_image(self, vaes: Any, kind: str) -> None:
        """With and without means and deviations of the latents, as Playground v2.5 has them."""

        def build(vae: Any) -> Any:
            return getattr(diffusers, kind)(
                vae=vae,
                text_encoder=None,
                text_encoder_2=None,
                tokenizer=None,
                tokenizer_2=None,
                unet=unet(
                    addition_embed_type="text_time",
                    addition_time_embed_dim=8,
                    projection_class_embeddings_input_dim=6 * 8 + 16,
                    transformer_layers_per_block=1,
                    use_linear_projection=True,
                ),
                scheduler=diffusers.EulerDiscreteScheduler(steps_offset=1),
                force_zeros_for_empty_prompt=True,
                add_watermarker=False,
            )

        shared = {
            "prompt_embeds": make_input("prompt", (1, 7, 16), "latent"),
            "pooled_prompt_embeds": make_input("pooled", (1, 16), "latent"),
            "negative_prompt_embeds": make_input("negative", (1, 7, 16), "latent"),
            "negative_pooled_prompt_embeds": make_input("negative pooled", (1, 16), "latent"),
        }
        if "Img2Img" in kind:
            same_image(build, vaes, image=picture(), strength=0.75, **shared)
        else:
            same_image(build, vaes, height=PIXELS, width=PIXELS, **shared)


@of(FLUX1)
@pytest.mark.parametrize("kind", ["FluxPipeline", "FluxImg2ImgPipeline"])
def test_flux(vaes: Any, kind: str) -> None:
    """Shift and scale, and latents that are packed two by two."""

    def build(vae: Any) -> Any:
        torch.manual_seed(0)
        transformer = diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        ).eval()
        return getattr(diffusers, kind)(
            vae=vae,
            transformer=transformer,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
        )

    shared = {
        "prompt_embeds": make_input("prompt", (1, 7, 32), "latent"),
        "pooled_prompt_embeds": make_input("pooled", (1, 32), "latent"),
        "height": PIXELS,
        "width": PIXELS,
    }
    same_image(build, vaes, **shared, **({"image": picture(), "strength": 0.75} if "Img2Img" in kind else {}))


@of(SD3)
def test_stable_diffusion_3(vaes: Any) -> None:
    def build(vae: Any) -> Any:
        torch.manual_seed(0)
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=PIXELS // 8,
            patch_size=2,
            in_channels=16,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=32,
            pooled_projection_dim=64,
            out_channels=16,
        ).eval()
        absent = dict.fromkeys(f"{part}{index}" for part in ("text_encoder", "tokenizer") for index in ("", "_2", "_3"))
        return diffusers.StableDiffusion3Pipeline(
            vae=vae, transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **absent
        )

    shared = {
        "prompt_embeds": make_input("prompt", (1, 7, 32), "latent"),
        "negative_prompt_embeds": make_input("negative", (1, 7, 32), "latent"),
        "pooled_prompt_embeds": make_input("pooled", (1, 64), "latent"),
        "negative_pooled_prompt_embeds": make_input("negative pooled", (1, 64), "latent"),
    }
    same_image(build, vaes, **shared, height=PIXELS, width=PIXELS)
