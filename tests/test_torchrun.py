"""The command on several devices, as a user starts it: torchrun, with ranks that talk over Gloo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fastvideo_vae_core as fvae
from fastvideo_vae_core.cli.__main__ import main
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.latents import read_latents
from fastvideo_vae_core.media import VideoReader, VideoWriter, read_audio, read_image, write_image
from fastvideo_vae_core.testing.golden import fill
from fastvideo_vae_wan import WAN21, AutoencoderKLWan

IMAGES, SOUND = "autoencoder_kl", "oobleck"
# A level of 256, in [-1, 1].
LEVEL = 2 / 255


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def demonstration(family: str) -> Path:
    """The photograph or recording that ships with a family."""
    described = fvae.resolve(family)
    return Path(str(described.resource(str(described.demo_media))))


def save_clip(frames: int) -> list[str]:
    """A clip and a tiny model of Wan with random weights; the options that name it."""
    arch = replace(WAN21, base_dim=4, num_res_blocks=1)
    model = AutoencoderKLWan(VAEConfig(arch_config=arch))
    fill(model)
    Path("model").mkdir()
    save_file(model.state_dict(), Path("model", "diffusion_pytorch_model.safetensors"))
    Path("model", "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan", **arch.to_dict()}))
    t, x, y = torch.arange(frames).view(-1, 1, 1) * 0.3, torch.arange(44) / 7, torch.arange(70).view(-1, 1) / 5
    with VideoWriter("clip.mp4", frame_rate=24, height=70, width=44) as writer:
        writer.write((torch.sin(x + t) * torch.cos(y - t)).expand(3, -1, -1, -1))
    return ["--model", "model"]


def command(*arguments: str | Path, ranks: int) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "-m", "fastvideo_vae_core"]
    return [*launcher, *map(str, arguments)]


def run(*arguments: str | Path, ranks: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments, ranks=ranks), capture_output=True, text=True, timeout=240, check=False)


def alone(*arguments: str | Path) -> None:
    assert main([*map(str, arguments), "-q"]) == 0


def files(desk: Path) -> set[str]:
    return {path.name for path in desk.iterdir()}


def frames_of(name: str) -> Tensor:
    with VideoReader(name) as reader:
        return torch.cat([*reader], 1)


def test_a_picture_is_decoded_together(desk: Path) -> None:
    write_image("photograph.png", read_image(demonstration(IMAGES))[:, :96, :72])
    alone("encode", "photograph.png", "-o", "z.safetensors", "--family", IMAGES)
    alone("decode", "z.safetensors", "-o", "one.png")
    ran = run("decode", "z.safetensors", "-o", "two.png", "-q", "--plan", ranks=2)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("devices 2 ranks") == 1
    one, two = (read_image(name) for name in ("one.png", "two.png"))
    # Sums come in another order, so a number that lies between two levels may fall to the other side.
    assert (one - two).abs().max() <= 1.01 * LEVEL
    assert ((one - two).abs() > 0).double().mean() < 1e-3
    assert files(desk) == {"photograph.png", "z.safetensors", "one.png", "two.png"}


@pytest.mark.slow
def test_an_error_is_said_once_and_ends_all(desk: Path) -> None:
    ran = run("decode", "nothing.safetensors", "-o", "picture.png", ranks=3)
    assert ran.returncode != 0
    [line] = [line for line in ran.stderr.splitlines() if line.startswith("fastvideo-vae: ")]
    assert "nothing.safetensors cannot be read" in line
    assert files(desk) == set()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_recording_streams_through_all(desk: Path, ranks: int) -> None:
    # The shipped weights are float16, and so would be the latents.
    model = ["--family", SOUND, "--dtype", "float32"]
    alone("encode", demonstration(SOUND), "-o", "one.safetensors", *model)
    ran = run("encode", demonstration(SOUND), "-o", "all.safetensors", *model, ranks=ranks)
    assert ran.returncode == 0, ran.stderr
    one, together = (read_latents(name).latents for name in ("one.safetensors", "all.safetensors"))
    assert (one - together).abs().max() <= 1e-5 * one.abs().max()
    alone("decode", "one.safetensors", "-o", "one.wav", *model, "--force")
    assert run("decode", "one.safetensors", "-o", "all.wav", *model, "--force", ranks=ranks).returncode == 0
    one, together = (read_audio(name)[0] for name in ("one.wav", "all.wav"))
    assert one.shape == together.shape
    assert (one - together).abs().max() <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_clip_streams_through_all(desk: Path, ranks: int) -> None:
    model = save_clip(27)
    alone("encode", "clip.mp4", "-o", "one.safetensors", *model)
    ran = run("encode", "clip.mp4", "-o", "all.safetensors", *model, ranks=ranks)
    assert ran.returncode == 0, ran.stderr
    one, together = (read_latents(name).latents for name in ("one.safetensors", "all.safetensors"))
    assert (one - together).abs().max() <= 1e-5 * one.abs().max()
    alone("decode", "one.safetensors", "-o", "one.mkv", "--crf", "0", *model)
    ran = run("decode", "one.safetensors", "-o", "all.mkv", "--crf", "0", *model, "--plan", ranks=ranks)
    assert ran.returncode == 0, ran.stderr
    assert f"devices {ranks} ranks" in ran.stdout
    assert "streamed" in ran.stdout
    one, together = frames_of("one.mkv"), frames_of("all.mkv")
    assert one.shape == together.shape
    assert (one - together).abs().mean() < LEVEL / 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["picture", "recording", "clip"])
def test_a_round_trip_measures_the_same(desk: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    media, suffix, model = {
        "picture": lambda: (demonstration(IMAGES), ".png", ["--family", IMAGES]),
        "recording": lambda: (demonstration(SOUND), ".wav", ["--family", SOUND]),
        "clip": lambda: ("clip.mp4", ".mp4", save_clip(9)),
    }[kind]()
    there = files(desk)
    assert main(["roundtrip", str(media), "-o", f"1{suffix}", *model, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["metrics"]
    ran = run("roundtrip", media, "-o", f"2{suffix}", *model, "--json", ranks=2)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["metrics"] == pytest.approx(first, rel=1e-3)
    assert files(desk) - there == {f"{ranks}{end}" for ranks in (1, 2) for end in (suffix, "-comparison.png")}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_that_is_killed_leaves_nothing(desk: Path, ranks: int) -> None:
    """In the middle of a clip, whose file is being written."""
    model = save_clip(401)
    alone("encode", "clip.mp4", "-o", "z.safetensors", *model)
    there = files(desk)
    call = command("decode", "z.safetensors", "-o", "made.mp4", "--timeout", "10", *model, ranks=ranks)
    with subprocess.Popen(call, stderr=subprocess.PIPE, text=True) as process:
        while not any(name.startswith(".made.") for name in files(desk)):
            assert process.poll() is None
            time.sleep(0.02)
        workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
        os.kill(max(map(int, workers.stdout.split())), signal.SIGKILL)
        process.communicate(timeout=60)
    assert process.returncode != 0
    assert files(desk) == there
