"""The command line on a clip: what streams from file to file is what the model gives in one call."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fastvideo_vae_core as fvae
from fastvideo_vae_core.latents import read_latents
from fastvideo_vae_core.media import VideoReader, VideoWriter, probe_video
from fastvideo_vae_core.metrics import psnr
from fastvideo_vae_core.testing.command import Command
from fastvideo_vae_core.testing.parity import relative_error
from fastvideo_vae_wan import WAN21, WAN22, AutoencoderKLWan, WanArchConfig

NARROW = {
    "wan2.1": replace(WAN21, base_dim=4, num_res_blocks=1),
    "wan2.2": replace(WAN22, base_dim=4, decoder_base_dim=4, num_res_blocks=1),
}
NTSC = Fraction(30_000, 1001)
# No 4k + 1, and no multiples of 8.
FRAMES, HEIGHT, WIDTH = 43, 30, 44


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture(params=NARROW)
def desk(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    random_model: Callable[[WanArchConfig], AutoencoderKLWan],
) -> Path:
    """A folder to work in, with a clip and random weights in diffusers' layout."""
    monkeypatch.chdir(tmp_path)
    arch = NARROW[request.param]
    (tmp_path / "model").mkdir()
    save_file(random_model(arch).state_dict(), tmp_path / "model" / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "AutoencoderKLWan", **arch.to_dict()}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    t = torch.arange(FRAMES).view(1, -1, 1, 1) * 0.3
    x, y = torch.arange(WIDTH) / 7, torch.arange(HEIGHT).view(-1, 1) / 5
    phase = torch.tensor([0.0, 2.0, 4.0]).view(3, 1, 1, 1)
    with VideoWriter("clip.mp4", frame_rate=NTSC, height=HEIGHT, width=WIDTH) as writer:
        writer.write(torch.sin(x + t + phase) * torch.cos(y - t))
    return tmp_path


def read(path: str) -> Tensor:
    with VideoReader(path) as reader:
        return torch.cat(list(reader), 1)[None]


def load() -> Any:
    return fvae.load("model")


def test_a_clip_becomes_the_latents_of_one_call_and_comes_back(run: Command, desk: Path) -> None:
    vae = load()
    encoded = run("encode", "clip.mp4", "-o", "clip.safetensors", "--model", "model")
    assert encoded.code == 0, encoded.err
    assert "43 x 30 x 44 is padded to 45 x 32 x" in encoded.err
    file = read_latents("clip.safetensors")
    assert (file.sample_shape, file.frame_rate) == ((1, 3, FRAMES, HEIGHT, WIDTH), str(NTSC))
    with torch.no_grad():
        expected = vae.encode(vae.pad_to_valid(read("clip.mp4"))).latent_dist.mode()
        # The same sums; the machine's kernels may order them by the length of a piece.
        assert relative_error(file.latents, expected) <= 1e-5
        sample = vae.crop_to(vae.decode(file.latents).sample, file.sample_shape)

    decoded = run("decode", "clip.safetensors", "-o", "back.mp4", "--model", "model", "--crf", "0")
    assert decoded.code == 0, decoded.err
    info = probe_video("back.mp4")
    assert (info.frames, info.height, info.width, info.frame_rate) == (FRAMES, HEIGHT, WIDTH, NTSC)
    # Random weights make noise, of which 4:2:0 keeps half the colour; the brightness is kept to a level or two.
    luma = torch.tensor([0.2126, 0.7152, 0.0722]).view(1, 3, 1, 1, 1)
    assert ((read("back.mp4") - sample) * luma).sum(1).abs().mean() <= 2 / 127.5


def test_a_round_trip_measures_the_whole_clip(run: Command, desk: Path) -> None:
    vae = load()
    document = run("roundtrip", "clip.mp4", "-o", "back.mkv", "--model", "model", "--json").json
    x = read("clip.mp4")
    with torch.no_grad():
        y = vae.decode(vae.encode(vae.pad_to_valid(x)).latent_dist.mode()).sample
    expected = psnr(x, vae.crop_to(y, x.shape)).item()
    assert document["metrics"]["psnr"] == pytest.approx(expected, abs=1e-3)
    assert document["latent_shape"][2] == 12
    assert (desk / "back-comparison.png").stat().st_size


@pytest.mark.parametrize("desk", ["wan2.1"], indirect=True)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "streamed: the plan of a stretch"),
        (["--memory-budget", "5MiB"], "chosen for a budget of 5.00 MiB"),
        (["--tile", "16", "24"], "tiled, tiles of 45 x 16 x 24"),
        (["--tiling"], "tiled, tiles of"),
    ],
    ids=["plain", "budget", "tile", "tiling"],
)
def test_the_way_of_execution_does_not_show(run: Command, desk: Path, arguments: list[str], words: str) -> None:
    ran = run("encode", "clip.mp4", "-o", "z.safetensors", "--model", "model", "--plan", *arguments)
    assert ran.code == 0, ran.err
    assert words in ran.out
    vae = load()
    with torch.no_grad():
        expected = vae.encode(vae.pad_to_valid(read("clip.mp4"))).latent_dist.mode()
    assert (read_latents("z.safetensors").latents - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("desk", ["wan2.1"], indirect=True)
def test_sizes_that_are_not_legal_are_refused_without_padding(run: Command, desk: Path) -> None:
    ran = run("encode", "clip.mp4", "-o", "z.safetensors", "--model", "model", "-q", "--no-pad")
    ran.assert_fails("30 x 44", "leave out --no-pad")
    with VideoWriter("even.mp4", frame_rate=25, height=32, width=48) as writer:
        writer.write(torch.zeros(3, 7, 32, 48))
    ran = run("encode", "even.mp4", "-o", "z.safetensors", "--model", "model", "-q", "--no-pad")
    ran.assert_fails("got 7 x 32 x 48; pass 5 x 32 x 48 or 9 x 32 x 48", "leave out --no-pad")
    assert not (desk / "z.safetensors").exists()
