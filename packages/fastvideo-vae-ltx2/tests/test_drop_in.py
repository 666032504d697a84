"""A diffusers pipeline with tiny random parts gives the same video and sound with our parts in it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder, LTX2VocoderWithBWE

import fastvideo_vae_core as fvae
from fastvideo_vae_core.testing.parity import assert_close

SAME = (2e-5, "the same latents, decoded in float32; a pipeline ends in numbers between 0 and 1")


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    """What is not an autoencoder. Text comes in as embeddings, so nothing is tokenized."""
    torch.manual_seed(0)
    transformer = LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=1,
        caption_channels=32,
        rope_double_precision=False,
    )
    connectors = LTX2TextConnectors(
        caption_channels=32,
        text_proj_in_factor=2,
        video_connector_num_attention_heads=4,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=4,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
    )
    return {
        "transformer": transformer.eval(),
        "connectors": connectors.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "text_encoder": None,
        "tokenizer": None,
    }


@pytest.fixture(scope="module", params=["2.0", "2.3", "timed"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """diffusers' networks, and ours loaded from the folders that diffusers makes of them."""
    torch.manual_seed(0)
    video = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("LTX2VideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 16),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False,) * 3,
        downsample_type=("spatial", "spatiotemporal"),
        upsample_type=("spatiotemporal", "spatial"),
        upsample_residual=(False, request.param != "2.3"),
        upsample_factor=(2, 2),
        patch_size=2,
        decoder_causal=False,
        decoder_spatial_padding_mode="zeros" if request.param == "2.3" else "reflect",
        timestep_conditioning=request.param == "timed",
        spatial_compression_ratio=8,
        temporal_compression_ratio=2,
    )
    video.latents_mean.normal_()
    video.latents_std.uniform_(0.5, 2.0)
    audio = AutoencoderKLLTX2Audio(base_channels=4, num_res_blocks=1, latent_channels=2, ch_mult=(1, 2, 2), mel_bins=8)
    audio.latents_mean.normal_()
    audio.latents_std.uniform_(0.5, 2.0)
    vocoder = extended() if request.param == "2.3" else LTX2Vocoder(in_channels=16, hidden_channels=32)
    theirs = {"vae": video.eval(), "audio_vae": audio.eval(), "vocoder": vocoder.eval()}
    root = tmp_path_factory.mktemp("ltx2")
    for name, part in theirs.items():
        part.save_pretrained(root / name)
    (root / "model_index.json").write_text("{}")
    return theirs, loaded(root)


def extended() -> LTX2VocoderWithBWE:
    """With a quiet first stage, because diffusers does not clamp it."""
    vocoder = LTX2VocoderWithBWE(
        in_channels=16,
        hidden_channels=64,
        bwe_in_channels=8,
        bwe_hidden_channels=32,
        num_mel_channels=4,
        filter_length=128,
        window_length=128,
    )
    vocoder.mel_stft.mel_basis.uniform_()
    vocoder.mel_stft.stft_fn.forward_basis.normal_()
    return vocoder


def loaded(root: Path) -> dict[str, Any]:
    components = {"vae": "video", "audio_vae": "audio", "vocoder": "vocoder"}
    return {name: fvae.load(root, component=component) for name, component in components.items()}


def generate(
    kind: Any, parts: dict[str, Any], ours: dict[str, Any], **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    with warnings.catch_warnings():
        # diffusers' registration does not know our classes, which it may say.
        warnings.simplefilter("ignore")
        pipeline = kind(**parts, **ours)
    pipeline.set_progress_bar_config(disable=True)
    text, mask = torch.ones(1, 6, 32, 2), torch.ones(1, 6, dtype=torch.long)
    made = pipeline(
        prompt_embeds=text.flatten(2),
        prompt_attention_mask=mask,
        guidance_scale=1.0,
        audio_guidance_scale=1.0,
        stg_scale=0.0,
        audio_stg_scale=0.0,
        modality_scale=1.0,
        audio_modality_scale=1.0,
        height=32,
        width=64,
        num_frames=9,
        frame_rate=25.0,
        num_inference_steps=2,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    return made.frames, made.audio


def test_text_to_video_with_sound(parts: dict[str, Any], pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    options = (
        {"decode_timestep": 0.05, "decode_noise_scale": 0.025} if theirs["vae"].config.timestep_conditioning else {}
    )
    frames, sound = generate(LTX2Pipeline, parts, theirs, **options)
    assert frames.shape == (1, 9, 3, 32, 64)
    assert float(frames.std()) > 0.01
    made_frames, made_sound = generate(LTX2Pipeline, parts, ours, **options)
    assert_close(made_frames, frames, *SAME)
    assert_close(made_sound, sound, *SAME)


def test_image_to_video_with_sound(parts: dict[str, Any], pair: tuple[Any, Any]) -> None:
    """The pipeline encodes the picture, and takes the mode."""
    theirs, ours = pair
    picture = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(1))
    frames, sound = generate(LTX2ImageToVideoPipeline, parts, theirs, image=picture, image_crf=0)
    made_frames, made_sound = generate(LTX2ImageToVideoPipeline, parts, ours, image=picture, image_crf=0)
    assert_close(made_frames, frames, *SAME)
    assert_close(made_sound, sound, *SAME)


def test_names_that_pipelines_read(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    for name in ("spatial_compression_ratio", "temporal_compression_ratio", "dtype", "device"):
        assert getattr(ours["vae"], name) == getattr(theirs["vae"], name)
    for name in ("temporal_compression_ratio", "mel_compression_ratio"):
        assert getattr(ours["audio_vae"], name) == getattr(theirs["audio_vae"], name)
    assert ours["vocoder"].config.output_sampling_rate == theirs["vocoder"].config.output_sampling_rate
