"""A diffusers pipeline with tiny random parts gives the same waveform with our autoencoder in it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderOobleck, EDMDPMSolverMultistepScheduler, StableAudioDiTModel, StableAudioPipeline
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel

from fastvideo_vae_core.loading import load
from fastvideo_vae_core.testing.parity import assert_close

LATENTS, HOP, RATE = 32, 24, 240


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    torch.manual_seed(0)
    transformer = StableAudioDiTModel(
        sample_size=LATENTS,
        in_channels=6,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        out_channels=6,
        cross_attention_dim=4,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=4,
    )
    projection = StableAudioProjectionModel(text_encoder_dim=4, conditioning_dim=4, min_value=0, max_value=32)
    scheduler = EDMDPMSolverMultistepScheduler(solver_order=2, prediction_type="v_prediction", sigma_data=1.0)
    return {
        "transformer": transformer.eval(),
        "projection_model": projection.eval(),
        "scheduler": scheduler,
        # Text comes in as embeddings, so nothing is tokenized.
        "text_encoder": None,
        "tokenizer": None,
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[AutoencoderOobleck, Path]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        vae = AutoencoderOobleck(
            encoder_hidden_size=12,
            downsampling_ratios=[4, 6],
            channel_multiples=[1, 2],
            decoder_channels=6,
            decoder_input_channels=6,
            audio_channels=2,
            sampling_rate=RATE,
        ).eval()
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return vae, folder


def generate(parts: dict[str, Any], vae: Any, **options: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        # diffusers' registration does not know our class, which it may say.
        warnings.simplefilter("ignore")
        pipeline = StableAudioPipeline(vae=vae, **parts)
    pipeline.set_progress_bar_config(disable=True)
    text = torch.ones(1, 5, 4)
    return pipeline(
        prompt_embeds=text,
        negative_prompt_embeds=-text,
        attention_mask=torch.ones(1, 5, dtype=torch.long),
        negative_attention_mask=torch.ones(1, 5, dtype=torch.long),
        audio_end_in_s=LATENTS * HOP / RATE,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        **options,
    ).audios


def test_text_to_audio(parts: dict[str, Any], reference: tuple[AutoencoderOobleck, Path]) -> None:
    theirs, folder = reference
    expected = generate(parts, theirs)
    assert expected.shape == (1, 2, LATENTS * HOP)
    assert_close(generate(parts, load(folder)), expected, 1e-6, "the same latents, decoded in float32")


def test_audio_to_audio(parts: dict[str, Any], reference: tuple[AutoencoderOobleck, Path]) -> None:
    """The pipeline draws latents from the encoder's posterior with its generator."""
    theirs, folder = reference
    start = torch.rand(1, 2, LATENTS * HOP, generator=torch.Generator().manual_seed(1)) - 0.5
    options = {"initial_audio_waveforms": start, "initial_audio_sampling_rate": RATE}
    expected = generate(parts, theirs, **options)
    made = generate(parts, load(folder), **options)
    assert_close(made, expected, 1e-6, "the same noise, encoded and decoded in float32")
    assert not torch.allclose(made, generate(parts, load(folder)))


def test_names_that_pipelines_read(reference: tuple[AutoencoderOobleck, Path]) -> None:
    theirs, folder = reference
    ours = load(folder)
    assert ours.hop_length == theirs.hop_length == HOP
    assert ours.sampling_rate == theirs.sampling_rate == RATE
    assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
    for name in ("sampling_rate", "audio_channels", "downsampling_ratios", "decoder_input_channels"):
        value = getattr(ours.config, name)
        assert (list(value) if isinstance(value, tuple) else value) == getattr(theirs.config, name)
