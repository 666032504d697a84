"""The command line on recordings: what streams from file to file is what the model gives in one call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fastvideo_vae_core as fvae
from fastvideo_vae_core.audio_metrics import si_sdr
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.latents import read_latents
from fastvideo_vae_core.media import probe_audio, read_audio, resample, write_audio
from fastvideo_vae_core.testing.command import Command
from fastvideo_vae_core.testing.golden import fill
from fastvideo_vae_core.testing.parity import relative_error
from fastvideo_vae_oobleck import AutoencoderOobleck, OobleckArchConfig

RATE = 8_000
# Strides 4 x 3: 12 samples of a latent, of which an odd stride loses some.
ARCH = OobleckArchConfig(
    encoder_hidden_size=6,
    downsampling_ratios=(4, 3),
    channel_multiples=(1, 2),
    decoder_channels=4,
    decoder_input_channels=3,
    sampling_rate=RATE,
)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a recording and random weights in diffusers' layout."""
    monkeypatch.chdir(tmp_path)
    model = AutoencoderOobleck(VAEConfig(arch_config=ARCH))
    fill(model, gains={"*res_unit*.conv2.weight": 0.4, "*.conv2.weight": 0.2, "*.conv_t1.weight": 1.5})
    (tmp_path / "model").mkdir()
    save_file(model.state_dict(), tmp_path / "model" / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "AutoencoderOobleck", **ARCH.to_dict()}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    # More than one piece of 512 latents.
    write_audio("song.flac", tones(20_001, RATE), RATE)
    return tmp_path


def tones(samples: int, rate: int, channels: int = 2) -> torch.Tensor:
    t = torch.arange(samples, dtype=torch.float64) / rate
    pitch = torch.tensor([[220.0], [331.0]], dtype=torch.float64)[:channels]
    return (0.5 * torch.sin(2 * torch.pi * pitch * t) + 0.2 * torch.sin(2 * torch.pi * 5 * pitch * t * t)).float()


def load() -> Any:
    return fvae.load("model")


def test_a_recording_becomes_the_latents_of_one_call_and_comes_back(run: Command, desk: Path) -> None:
    vae = load()
    encoded = run("encode", "song.flac", "-o", "song.safetensors", "--model", "model")
    assert encoded.code == 0, encoded.err
    assert "20001 is padded to" in encoded.err
    file = read_latents("song.safetensors")
    assert (file.sample_shape, file.sampling_rate) == ((1, 2, 20_001), RATE)
    x = read_audio("song.flac")[0][None]
    with torch.no_grad():
        assert relative_error(file.latents, vae.encode(vae.pad_to_valid(x)).latent_dist.mode()) <= 1e-5
        sample = vae.crop_to(vae.decode(file.latents).sample, x.shape)
    assert run("decode", "song.safetensors", "-o", "back.wav", "--model", "model").code == 0
    back, rate = read_audio("back.wav")
    assert rate == RATE
    # 24 bits of a file, and float32 sums in another order.
    assert (back - sample[0].clamp(-1, 1)).abs().max() <= 1e-5


def test_a_round_trip_at_another_rate_in_mono(run: Command, desk: Path) -> None:
    vae = load()
    write_audio("mono.mp3", tones(22_050, 11_025, channels=1), 11_025)
    document = run("roundtrip", "mono.mp3", "-o", "back.flac", "--model", "model", "--json").json
    assert document["notes"][:2] == ["mono is duplicated to 2 channels", f"resampled from 11025 to {RATE} Hz"]
    x = resample(read_audio("mono.mp3")[0], 11_025, RATE).expand(2, -1)[None]
    assert document["sample_shape"] == list(x.shape)
    with torch.no_grad():
        y = vae.crop_to(vae.decode(vae.encode(vae.pad_to_valid(x)).latent_dist.mode()).sample, x.shape)
    assert document["metrics"]["si_sdr"] == pytest.approx(si_sdr(x, y.clamp(-1, 1)).item(), abs=1e-2)
    assert (probe_audio("back.flac").sample_rate, probe_audio("back.flac").channels) == (RATE, 2)
    assert (desk / "back-comparison.png").stat().st_size


@pytest.mark.parametrize("arguments", [[], ["--memory-budget", "300KiB"]], ids=["plain", "budget"])
def test_the_way_of_execution_does_not_show(run: Command, desk: Path, arguments: list[str]) -> None:
    ran = run("encode", "song.flac", "-o", "z.safetensors", "--model", "model", "--plan", *arguments)
    assert ran.code == 0, ran.err
    assert ("chosen for a budget of" if arguments else "streamed: the plan of a stretch") in ran.out
    vae = load()
    with torch.no_grad():
        expected = vae.encode(vae.pad_to_valid(read_audio("song.flac")[0][None])).latent_dist.mode()
    assert (read_latents("z.safetensors").latents - expected).abs().max() <= 1e-5


def test_what_means_nothing_for_sound_is_refused(run: Command, desk: Path) -> None:
    encode = ("encode", "song.flac", "-o", "z.safetensors", "--model", "model", "-q")
    run(*encode, "--tiling").assert_fails("--tiling is for image and video, this is audio")
    run(*encode, "--no-pad").assert_fails("got 20001; pass", "leave out --no-pad")
    assert not (desk / "z.safetensors").exists()
