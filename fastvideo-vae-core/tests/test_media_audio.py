"""Sound: sample-exact where the format is, counted clipping, block streaming, and named errors."""

from __future__ import annotations

import math
import sys
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
import pytest
import soundfile
import torch

from fastvideo_vae_core.errors import MediaError, ShapeError
from fastvideo_vae_core.media import AudioReader, AudioWriter, Resampler, probe_audio, read_audio, resample, write_audio

RATE = 48_000


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    """Two seconds and a bit, a length that no frame size divides, low-passed so that lossy codecs keep it."""
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(2, 2 * RATE + 777 + 62, generator=generator) * 0.3
    return torch.nn.functional.avg_pool1d(white[None], 63, 1)[0]


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".aiff"])
def test_lossless_formats_keep_24_bits(tmp_path: Path, noise: torch.Tensor, suffix: str) -> None:
    path = tmp_path / f"sound{suffix}"
    assert write_audio(path, noise, RATE) == 0
    x_CS, rate = read_audio(path)
    assert rate == RATE
    assert x_CS.shape == noise.shape
    assert x_CS.dtype == torch.float32
    assert (x_CS - noise).abs().max() < 2**-22
    info = probe_audio(path)
    assert (info.codec, info.channels, info.samples) == ("pcm_24", 2, noise.shape[1])
    assert info.duration == Fraction(noise.shape[1], RATE)


@pytest.mark.parametrize("suffix", [".ogg", ".mp3", ".m4a", ".opus"])
def test_lossy_formats_keep_length_and_alignment(tmp_path: Path, noise: torch.Tensor, suffix: str) -> None:
    path = tmp_path / f"sound{suffix}"
    write_audio(path, noise, RATE)
    x_CS, rate = read_audio(path)
    assert rate == RATE
    assert x_CS.shape == noise.shape, "encoder delay or padding was left in"
    middle = slice(20_000, 80_000)
    error = (x_CS[:, middle] - noise[:, middle]).pow(2).mean().sqrt() / noise[:, middle].pow(2).mean().sqrt()
    assert error < 0.2


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3", ".m4a", ".opus"])
@pytest.mark.parametrize("block", [777, 1000, 50_000])
def test_blocks_join_to_the_whole(tmp_path: Path, noise: torch.Tensor, suffix: str, block: int) -> None:
    """A tone after the noise, because it is with tones that libsndfile fails this for mp3 in blocks of 777 and 1000."""
    path = tmp_path / f"sound{suffix}"
    tone = torch.sin(torch.arange(60_000) * 0.06).expand(2, -1) * 0.5
    write_audio(path, torch.cat([noise[:, :20_000], tone], dim=1), RATE)
    whole, _ = read_audio(path)
    with AudioReader(path, block=block) as reader:
        blocks = list(reader)
        assert reader.read(10).shape == (2, 0)
    assert {piece.shape[1] for piece in blocks[:-1]} <= {block}
    assert torch.equal(torch.cat(blocks, dim=1), whole)


def test_clipping_is_counted(tmp_path: Path) -> None:
    x_CS = torch.tensor([[0.5, 1.0, 1.5, -1.0, -9.0, 0.0]])
    assert write_audio(tmp_path / "loud.wav", x_CS, RATE) == 2
    assert (read_audio(tmp_path / "loud.wav")[0] - x_CS.clamp(-1, 1)).abs().max() < 1e-6
    with AudioWriter(tmp_path / "loud.flac", sample_rate=RATE, channels=1) as writer:
        writer.write(x_CS)
        writer.write(x_CS.bfloat16() * 3)
        assert (writer.clipped, writer.samples) == (2 + 5, 12)


def test_existing_files_of_other_depths_are_read(tmp_path: Path) -> None:
    ramp = np.linspace(-1, 1, 101)
    for subtype, tolerance in {"PCM_16": 1e-4, "PCM_U8": 1e-2, "FLOAT": 1e-7, "PCM_32": 1e-7}.items():
        soundfile.write(tmp_path / "a.wav", ramp, 8000, subtype)
        x_CS, rate = read_audio(tmp_path / "a.wav")
        assert (rate, tuple(x_CS.shape)) == (8000, (1, 101))
        assert np.abs(x_CS[0].numpy() - ramp).max() < tolerance


def test_the_tracks_of_a_video_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("flac", rate=RATE, layout="mono") for _ in range(2)]
        for stream, level in zip(streams, (0.25, -0.5), strict=True):
            frame = av.AudioFrame.from_ndarray(np.full((1, 9000), level, np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = RATE, 0
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
    for track, level in enumerate((0.25, -0.5)):
        with AudioReader(path, track=track) as reader:
            assert reader.read(99_999).eq(level).sum() == 9000
    with pytest.raises(MediaError, match="2 sound tracks, and track 2"):
        AudioReader(path, track=2)


def test_resampling_keeps_a_tone_and_its_length() -> None:
    time = torch.arange(44_100) / 44_100
    tone = torch.sin(2 * math.pi * 1000 * time)[None]
    y_CS = resample(tone, 44_100, 48_000)
    assert y_CS.shape == (1, 48_000)
    expected = torch.sin(2 * math.pi * 1000 * torch.arange(48_000) / 48_000)
    assert (y_CS[0, 200:-200] - expected[200:-200]).abs().max() < 0.01
    assert resample(tone, 44_100, 44_100) is tone
    with pytest.raises(MediaError, match="positive whole numbers"):
        resample(tone, 0, 48_000)


@pytest.mark.parametrize(("before", "after"), [(48_000, 44_100), (44_100, 48_000), (11_025, 44_100), (96_000, 16_000)])
@pytest.mark.parametrize("samples", [1, 100, 9999])
def test_blocks_resample_like_the_whole(before: int, after: int, samples: int) -> None:
    x = torch.randn(2, samples, generator=torch.Generator().manual_seed(0))
    whole = resample(x, before, after)
    for size in (samples, 641, 13 if samples < 1000 else 4096):
        resampler = Resampler(before, after)
        pieces = [*map(resampler.push, x.split(size, 1)), resampler.finish()]
        made = torch.cat(pieces, 1)
        assert made.shape == whole.shape
        # The same sums in another order.
        assert (made - whole).abs().max() < 2e-6
        assert resampler._held is None or resampler._held.shape[1] < size + 4 * resampler._context


def test_a_resampler_between_equal_rates_holds_nothing() -> None:
    resampler = Resampler(8000, 8000)
    x = torch.randn(2, 10)
    assert torch.equal(resampler.push(x), x)
    assert resampler.finish().numel() == 0
    with pytest.raises(MediaError, match="positive whole numbers"):
        Resampler(0, 8000)


@pytest.mark.parametrize("layout", ["mono", "stereo"])
def test_channels_are_mixed_down_so_that_nothing_clips(tmp_path: Path, layout: Literal["mono", "stereo"]) -> None:
    soundfile.write(tmp_path / "six.wav", np.ones((1000, 6)) * 0.999, 8000, subtype="PCM_24")
    with AudioReader(tmp_path / "six.wav", downmix=layout) as reader:
        mixed = torch.cat(list(reader), 1)
        assert reader.info.channels == mixed.shape[0] == (1 if layout == "mono" else 2)
    assert mixed.shape[1] == 1000
    assert 0.9 < mixed.max() <= 1
    # What has no more channels than that is left alone.
    soundfile.write(tmp_path / "one.wav", np.ones((1000, 1)) * 0.5, 8000, subtype="PCM_24")
    with AudioReader(tmp_path / "one.wav", downmix=layout) as reader:
        assert reader.info.channels == 1


def test_missing_libraries_name_their_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_audio(tmp_path / "a.wav", torch.zeros(1, 10), RATE)
    monkeypatch.setitem(sys.modules, "torchaudio.functional", None)
    with pytest.raises(MediaError, match=r"torchaudio is not installed; run: .*\[audio\]"):
        resample(torch.zeros(1, 10), 44_100, 48_000)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(MediaError, match=r"soundfile is not installed; run: .*\[media\]"):
        read_audio(tmp_path / "a.wav")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MediaError, match=r"PyAV is not installed; run: .*\[media\]"):
        write_audio(tmp_path / "a.m4a", torch.zeros(1, 10), RATE)


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    x_CS = torch.zeros(2, 100)
    for name, sound, rate, reason in [
        ("a.xyz", x_CS, RATE, "choose one of these suffixes"),
        ("no/a.wav", x_CS, RATE, "does not exist; create it first"),
        ("a.wav", x_CS / 0, RATE, "200 samples are not finite"),
        ("a.m4a", x_CS / 0, RATE, "not finite"),
        ("a.wav", x_CS, 0, "positive rate"),
        ("a.wav", x_CS[0], RATE, "needs \\(C, S\\)"),
        ("a.opus", x_CS, 44_100, "resample to 48000"),
        ("a.m4a", torch.zeros(7, 10), RATE, "write wav"),
        ("a.mp3", torch.zeros(6, 10), RATE, "does not take 6 channels"),
    ]:
        with pytest.raises(MediaError, match=reason):
            write_audio(tmp_path / name, sound, rate)
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(ShapeError, match=r"takes \(2, S\)"),
        AudioWriter(tmp_path / "a.wav", sample_rate=RATE, channels=2) as writer,
    ):
        writer.write(x_CS.T)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".wav", ".m4a"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"sound{suffix}"
    target.write_text("old")

    def fail_half_way() -> None:
        with AudioWriter(target, sample_rate=RATE, channels=1) as writer:
            writer.write(torch.zeros(1, 5000))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_half_way()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_what_is_no_sound_is_refused_in_one_line(tmp_path: Path) -> None:
    for name in ("text.wav", "text.m4a", "text.mp3"):
        (tmp_path / name).write_text("hello")
        with pytest.raises(MediaError, match="cannot be read") as caught:
            read_audio(tmp_path / name)
        assert "\n" not in str(caught.value)
    (tmp_path / "empty.wav").touch()
    for name, reason in {"empty.wav": "is empty", "missing.wav": "No such file", "": "is a folder"}.items():
        with pytest.raises(MediaError, match=reason):
            probe_audio(tmp_path / name)


def test_a_truncated_file_is_refused(tmp_path: Path, noise: torch.Tensor) -> None:
    write_audio(tmp_path / "whole.flac", noise, RATE)
    data = (tmp_path / "whole.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(data[: len(data) // 2])
    with pytest.raises(MediaError, match=r"truncated|broken"):
        read_audio(tmp_path / "cut.flac")
