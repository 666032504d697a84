"""Video: colours against the standards' own arithmetic, streaming, sound, and files that are whole or absent."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from fastvideo_vae_core.errors import MediaError, ShapeError
from fastvideo_vae_core.media import ColorTags, VideoReader, VideoWriter, probe_video, to_uint8
from fastvideo_vae_core.media.audio import AudioReader

# Luma weights of red and blue.
WEIGHTS = {"bt709": (0.2126, 0.0722), "smpte170m": (0.299, 0.114), "bt2020nc": (0.2627, 0.0593)}
NUMBERS = {"bt709": 1, "smpte170m": 6, "bt2020nc": 9, None: 2}
NTSC_FILM = Fraction(24_000, 1001)


def solid(rgb: tuple[int, int, int], frames: int = 3, height: int = 64, width: int = 64) -> torch.Tensor:
    return (torch.tensor(rgb) / 127.5 - 1).view(3, 1, 1, 1).expand(3, frames, height, width)


def clip(frames: int, height: int = 32, width: int = 32) -> torch.Tensor:
    """Every frame differs from every other, and stays smooth enough for a lossy codec."""
    t = torch.arange(frames).view(1, -1, 1, 1) * 0.4
    phase = torch.tensor([0.0, 2.0, 4.0]).view(3, 1, 1, 1)
    x, y = torch.arange(width) / width * 6, torch.arange(height).view(-1, 1) / height * 6
    return torch.sin(x + t + phase) * torch.cos(y - t) * 0.9


def write(path: Path, x_CTHW: torch.Tensor, **options: Any) -> None:
    frame_rate = options.pop("frame_rate", 25)
    with VideoWriter(path, frame_rate=frame_rate, height=x_CTHW.shape[2], width=x_CTHW.shape[3], **options) as writer:
        writer.write(x_CTHW)


def read(path: Path) -> torch.Tensor:
    with VideoReader(path) as reader:
        return torch.cat(list(reader), dim=1)


def write_yuv(
    path: Path, planes: list[np.ndarray], pixel_format: str, matrix: str | None, full: bool = False, tagged: bool = True
) -> None:
    """One frame of given numbers, kept exactly by FFV1, behind none of the code under test."""
    height, width = planes[0].shape
    frame = av.VideoFrame(width, height, pixel_format)
    for plane, values in zip(frame.planes, planes, strict=True):
        rows = np.zeros((plane.height, plane.line_size // values.itemsize), values.dtype)
        rows[:, : values.shape[1]] = values
        plane.update(rows.tobytes())
    frame.pts = 0
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.colorspace = NUMBERS[matrix]
        stream.codec_context.color_range = (2 if full else 1) if tagged else 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def yuv_of(rgb: tuple[int, int, int], matrix: str, bits: int = 8, full: bool = False) -> list[float]:
    red_weight, blue_weight = WEIGHTS[matrix]
    red, green, blue = (value / 255 for value in rgb)
    luma = red_weight * red + (1 - red_weight - blue_weight) * green + blue_weight * blue
    chroma = ((blue - luma) / (2 - 2 * blue_weight), (red - luma) / (2 - 2 * red_weight))
    scale = 1 << (bits - 8)
    if full:
        top = (1 << bits) - 1
        return [luma * top, *(128 * scale + top * value for value in chroma)]
    return [(16 + 219 * luma) * scale, *((128 + 224 * value) * scale for value in chroma)]


def yuv_planes(values: list[float], height: int = 32, width: int = 32, bits: int = 8) -> list[np.ndarray]:
    dtype = np.uint8 if bits == 8 else np.uint16
    shapes = [(height, width), (height // 2, width // 2), (height // 2, width // 2)]
    top = (1 << bits) - 1
    return [np.full(shape, min(round(value), top), dtype) for shape, value in zip(shapes, values, strict=True)]


@pytest.mark.parametrize("rgb", [(255, 0, 0), (0, 0, 255), (120, 200, 40)])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", list(WEIGHTS))
def test_the_tagged_matrix_and_range_are_undone(
    tmp_path: Path, matrix: str, full: bool, rgb: tuple[int, int, int]
) -> None:
    path = tmp_path / "color.mkv"
    write_yuv(path, yuv_planes(yuv_of(rgb, matrix, full=full)), "yuv420p", matrix, full)
    x_CTHW = (read(path) + 1) * 127.5
    assert (x_CTHW[:, 0, 16, 16] - torch.tensor(rgb)).abs().max() <= 2, "half a level of chroma is one of blue"
    assert probe_video(path).color.matrix == matrix
    assert probe_video(path).color.range == ("pc" if full else "tv")


def test_levels_are_the_nearest_not_one_below(tmp_path: Path) -> None:
    """FFmpeg's fast path is a level dark on average; here the mean error over many colours is nothing."""
    luma, blue, red = (
        np.random.default_rng(place).integers(low, high, (4, 4), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
        for place, (low, high) in enumerate([(60, 190), (100, 156), (100, 156)])
    )
    write_yuv(tmp_path / "blocks.mkv", [luma, blue[::2, ::2], red[::2, ::2]], "yuv420p", "bt709")
    y, b, r = (luma - 16.0) / 219, (blue - 128.0) / 224, (red - 128.0) / 224
    expected = np.stack([y + 1.5748 * r, y - (0.2126 * 1.5748 * r + 0.0722 * 1.8556 * b) / 0.7152, y + 1.8556 * b])
    error = ((read(tmp_path / "blocks.mkv")[:, 0].numpy() + 1) / 2 - expected)[:, 8::16, 8::16] * 255
    assert np.abs(error).max() < 0.6
    assert abs(error.mean()) < 0.1


@pytest.mark.parametrize(("height", "matrix"), [(718, "smpte170m"), (720, "bt709")])
def test_untagged_video_follows_its_number_of_lines(tmp_path: Path, height: int, matrix: str) -> None:
    path = tmp_path / "untagged.mkv"
    write_yuv(path, yuv_planes(yuv_of((255, 0, 0), matrix), height=height, width=16), "yuv420p", None, tagged=False)
    assert probe_video(path).color == ColorTags(matrix=None, range=None, primaries=None, transfer=None)
    assert ((read(path)[:, 0, 300, 8] + 1) * 127.5 - torch.tensor([255, 0, 0])).abs().max() <= 1.5


@pytest.mark.parametrize("full", [False, True])
def test_10_bit_video_keeps_its_precision(tmp_path: Path, full: bool) -> None:
    ramp = np.broadcast_to(np.arange(400, 432, dtype=np.uint16), (32, 32))
    grey = np.full((16, 16), 512, np.uint16)
    write_yuv(tmp_path / "deep.mkv", [ramp, grey, grey], "yuv420p10le", "bt709", full)
    line = read(tmp_path / "deep.mkv")[1, 0, 16]
    expected = torch.arange(400, 432) / 1023 if full else (torch.arange(400, 432) - 64) / 876
    assert (line - (expected * 2 - 1)).abs().max() < 1 / 1023


def test_chroma_is_read_level_with_the_left_pixel(tmp_path: Path) -> None:
    """A slope in chroma: half a pixel of displacement would be 1.8 levels of red."""
    slope = 64 + 2 * np.arange(0, 64, 2)
    luma, blue = np.full((64, 64), 126, np.uint8), np.full((32, 32), 128, np.uint8)
    red = np.broadcast_to(slope, (32, 32)).astype(np.uint8)
    write_yuv(tmp_path / "slope.mkv", [luma, blue, red], "yuv420p", "bt709")
    line = (read(tmp_path / "slope.mkv")[0, 0, 32] + 1) * 127.5
    expected = ((126 - 16) / 219 + 1.5748 * (64 + 2 * torch.arange(64) - 128) / 224) * 255
    assert abs(float((line - expected)[12:52].mean())) < 0.3


def test_chroma_is_written_level_with_the_left_pixel(tmp_path: Path) -> None:
    red_chroma = (torch.arange(64) - 32) * 2 / 224
    line = torch.stack([0.5 + 1.5748 * red_chroma, 0.5 - 0.2126 * 1.5748 / 0.7152 * red_chroma, 0.5 + 0 * red_chroma])
    write(tmp_path / "slope.mp4", (line * 2 - 1).view(3, 1, 1, 64).expand(3, 2, 64, 64), crf=0)
    with av.open(str(tmp_path / "slope.mp4")) as container:
        plane = next(container.decode(video=0)).planes[2]
    stored = np.frombuffer(plane, np.uint8).reshape(plane.height, -1)[16, :32].astype(float)
    position = (stored - 128) / 2 + 32
    assert abs((position - np.arange(0, 64, 2))[6:26].mean()) < 0.15


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
def test_primaries_rate_and_tags_survive_every_container(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"color{suffix}"
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 50, 100)]
    x_CTHW = torch.cat([solid(rgb, frames=2) for rgb in colors], dim=1)
    write(path, x_CTHW, frame_rate=NTSC_FILM, crf=1)
    y_CTHW = read(path)
    assert y_CTHW.shape == x_CTHW.shape
    assert y_CTHW.dtype == torch.float32
    assert (to_uint8(y_CTHW).int() - to_uint8(x_CTHW).int()).abs().max() <= 2
    info = probe_video(path)
    assert info.frame_rate == NTSC_FILM
    assert not info.variable_frame_rate
    assert info.color == ColorTags()
    assert (info.width, info.height, info.has_audio, info.rotation, info.pixel_aspect) == (64, 64, False, 0, 1)
    assert info.duration == pytest.approx(12 / NTSC_FILM, abs=0.002)


@pytest.mark.parametrize("matrix", ["smpte170m", "bt2020nc"])
def test_other_tags_are_written_and_really_used(tmp_path: Path, matrix: str) -> None:
    tags = ColorTags(matrix=matrix, range="pc", primaries="bt2020", transfer="smpte2084")
    write(tmp_path / "hdr.mp4", solid((255, 0, 0)), color=tags, crf=1, pixel_aspect=Fraction(4, 3))
    assert probe_video(tmp_path / "hdr.mp4").color == tags
    assert probe_video(tmp_path / "hdr.mp4").pixel_aspect == Fraction(4, 3)
    with av.open(str(tmp_path / "hdr.mp4")) as container:
        frame = next(container.decode(video=0))
    stored = [np.frombuffer(plane, np.uint8)[0] for plane in frame.planes]
    assert np.abs(np.array(stored, float) - np.clip(yuv_of((255, 0, 0), matrix, full=True), 0, 255)).max() <= 1.5
    assert (to_uint8(read(tmp_path / "hdr.mp4")).int() - to_uint8(solid((255, 0, 0))).int()).abs().max() <= 2


def test_tags_of_any_source_can_be_passed_on(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", solid((9, 9, 9)), color=ColorTags(matrix="rgb", range=None, primaries=None))
    assert probe_video(tmp_path / "a.mp4").color == ColorTags()
    with pytest.raises(MediaError, match="colour tag 'ictcp'; use one of bt709"):
        VideoWriter(tmp_path / "a.mp4", frame_rate=25, height=8, width=8, color=ColorTags(matrix="ictcp"))


@pytest.mark.parametrize(("height", "width"), [(33, 47), (1, 1), (16, 15)])
@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_odd_sizes_lose_no_row_or_column(tmp_path: Path, suffix: str, height: int, width: int) -> None:
    path = tmp_path / f"odd{suffix}"
    x_CTHW = clip(4, height, width)
    write(path, x_CTHW, crf=4)
    assert read(path).shape == x_CTHW.shape
    assert (read(path) - x_CTHW).abs().mean() < 0.05


# The display matrix, and where the corners top left, top right, bottom left, bottom right of the stored picture go.
@pytest.mark.parametrize(
    ("matrix", "corners", "rotation", "mirrored"),
    [
        ((1, 0, 0, 1), "RGBK", 0, False),
        ((0, 1, -1, 0), "BRKG", 90, False),
        ((-1, 0, 0, -1), "KBGR", 180, False),
        ((0, -1, 1, 0), "GKRB", 270, False),
        ((-1, 0, 0, 1), "GRKB", 0, True),
        ((1, 0, 0, -1), "BKRG", 180, True),
        ((0, 1, 1, 0), "RBGK", 270, True),
        ((0, -1, -1, 0), "KGBR", 90, True),
    ],
)
def test_rotation_and_mirroring_are_applied(
    tmp_path: Path, matrix: tuple[int, ...], corners: str, rotation: int, mirrored: bool
) -> None:
    x_CTHW = torch.full((3, 2, 32, 48), -1.0)
    x_CTHW[0, :, :16, :24] = x_CTHW[1, :, :16, 24:] = x_CTHW[2, :, 16:, :24] = 1.0
    path = tmp_path / "phone.mp4"
    write(path, x_CTHW, crf=1)
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    data = path.read_bytes()
    place = data.index(identity, data.index(b"tkhd"))
    a, b, c, d = (value << 16 for value in matrix)
    path.write_bytes(data[:place] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[place + 36 :])

    with VideoReader(path) as reader:
        y_CTHW = reader.read(2)
        info = reader.info
    height, width = y_CTHW.shape[2:]
    assert (info.height, info.width) == (height, width) == ((48, 32) if rotation % 180 else (32, 48))
    assert (info.rotation, info.mirrored) == (rotation, mirrored)
    names = {(1, 0, 0): "R", (0, 1, 0): "G", (0, 0, 1): "B", (0, 0, 0): "K"}
    quarters = [(y, x) for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    assert "".join(names[tuple((y_CTHW[:, 0, y, x] > 0).int().tolist())] for y, x in quarters) == corners


def test_200_frames_in_chunks_are_those_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "long.mp4"
    x_CTHW = clip(200)
    with VideoWriter(path, frame_rate=25, height=32, width=32) as writer:
        for chunk_CTHW in x_CTHW.split(23, dim=1):
            writer.write(chunk_CTHW)
    with VideoReader(path) as reader:
        whole = reader.read(1000)
        assert reader.read(5).shape == (3, 0, 32, 32)
        assert reader.info.frames == 200
    with VideoReader(path, chunk=7) as reader:
        chunks = list(reader)
    assert [chunk.shape[1] for chunk in chunks] == [7] * 28 + [4]
    assert torch.equal(torch.cat(chunks, dim=1), whole)
    assert (whole - x_CTHW).abs().mean() < 0.03, "a frame out of order would be far off"
    assert whole.is_contiguous()


def test_reading_decodes_only_what_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "long.mp4"
    write(path, clip(200))
    with VideoReader(path) as reader:
        reader.read(3)
        decoded_ahead = sum(1 for _ in reader._decoded)
    assert decoded_ahead == 197, "frames were decoded and held, or lost"


def test_uneven_intervals_are_reported(tmp_path: Path) -> None:
    for name, times in {"even": range(0, 400, 40), "uneven": [0, 40, 80, 120, 200, 500, 540, 580, 620, 660]}.items():
        with av.open(str(tmp_path / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            stream.codec_context.time_base = Fraction(1, 1000)
            for time in times:
                frame = av.VideoFrame(32, 32, "yuv420p")
                frame.pts, frame.time_base = time, Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        info = probe_video(tmp_path / f"{name}.mp4")
        assert info.variable_frame_rate is (name == "uneven")
        assert info.duration is not None
        assert 10 / info.frame_rate == pytest.approx(float(info.duration), abs=0.01)


def test_an_animation_is_a_video(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 10), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    assert to_uint8(read(tmp_path / "a.gif"))[:, :, 5, 5].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert probe_video(tmp_path / "a.gif").frame_rate == 10


def with_sound(path: Path, codec: str, rate: int = 48_000, seconds: int = 2) -> np.ndarray:
    """24 pictures per second and noise; returns the noise."""
    noise = np.random.default_rng(3).standard_normal((2, rate * seconds)).astype(np.float32) * 0.1
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=24)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        audio = container.add_stream(codec, rate=rate, layout="stereo")
        for index in range(24 * seconds):
            picture = av.VideoFrame(32, 32, "yuv420p")
            picture.pts, picture.time_base = index, Fraction(1, 24)
            container.mux(video.encode(picture))
        container.mux(video.encode())
        sound = av.AudioFrame.from_ndarray(noise, format="fltp", layout="stereo")
        sound.sample_rate, sound.pts, sound.time_base = rate, 0, Fraction(1, rate)
        container.mux(audio.encode(sound))
        container.mux(audio.encode())
    return noise


def sound_of(path: Path) -> tuple[torch.Tensor, int, str]:
    with AudioReader(path) as reader:
        return torch.cat(list(reader), dim=1), reader.info.sample_rate, reader.info.codec


def displacement(noise: np.ndarray, samples: torch.Tensor) -> int:
    """By how many samples the sound comes late, looking 2000 either way."""
    return int(np.argmax(np.correlate(samples[0, 28_000:42_000].numpy(), noise[0, 30_000:40_000]))) - 2000


def packets_of(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]


def pictures_with_sound_from(source: Path, target: Path, frames: int) -> None:
    with VideoWriter(target, frame_rate=24, height=32, width=32, audio_from=source) as writer:
        for x_CTHW in clip(frames).split(5, dim=1):
            writer.write(x_CTHW)


@pytest.mark.parametrize(
    ("codec", "source", "target"),
    [("aac", ".mp4", ".mp4"), ("aac", ".mp4", ".mov"), ("libopus", ".mkv", ".webm"), ("flac", ".mkv", ".mkv")],
)
def test_sound_is_passed_through_untouched(tmp_path: Path, codec: str, source: str, target: str) -> None:
    origin, result = tmp_path / f"source{source}", tmp_path / f"result{target}"
    with_sound(origin, codec)
    pictures_with_sound_from(origin, result, 48)
    assert packets_of(result) == packets_of(origin)
    expected, actual = sound_of(origin), sound_of(result)
    assert actual[1:] == expected[1:]
    assert torch.equal(actual[0], expected[0])
    assert actual[0].shape[1] == 96_000
    assert probe_video(result).has_audio
    assert read(result).shape[1] == 48


def test_sound_ends_with_the_pictures(tmp_path: Path) -> None:
    with_sound(tmp_path / "source.mp4", "aac")
    pictures_with_sound_from(tmp_path / "source.mp4", tmp_path / "half.mp4", 24)
    samples = sound_of(tmp_path / "half.mp4")[0]
    assert 48_000 <= samples.shape[1] < 48_000 + 1024
    assert torch.equal(samples, sound_of(tmp_path / "source.mp4")[0][:, : samples.shape[1]])
    info = probe_video(tmp_path / "half.mp4")
    assert (info.duration, info.frame_rate, info.frames) == (1, 24, 24)


@pytest.mark.parametrize(
    ("codec", "target", "encoded"), [("aac", ".webm", "opus"), ("pcm_s16le", ".mp4", "aac"), ("flac", ".mov", "aac")]
)
def test_sound_that_the_container_refuses_is_encoded_in_step(
    tmp_path: Path, codec: str, target: str, encoded: str
) -> None:
    noise = with_sound(tmp_path / "source.mkv", codec)
    pictures_with_sound_from(tmp_path / "source.mkv", tmp_path / f"result{target}", 36)
    samples, rate, name = sound_of(tmp_path / f"result{target}")
    assert (samples.shape[1], rate, name) == (72_000, 48_000, encoded)
    assert abs(displacement(noise, samples)) <= 48, "the sound has moved by more than a millisecond"


def test_matroska_milliseconds_do_not_become_gaps(tmp_path: Path) -> None:
    """44.1 kHz AAC: 23.22 ms a packet, which Matroska rounds to 23 or 24."""
    with_sound(tmp_path / "source.mkv", "aac", rate=44_100)
    pictures_with_sound_from(tmp_path / "source.mkv", tmp_path / "result.mp4", 48)
    with av.open(str(tmp_path / "result.mp4")) as container:
        times = [packet.pts for packet in container.demux(audio=0) if packet.size]
    assert set(np.diff(times)) == {1024}


@pytest.mark.parametrize("target", ["copied.mp4", "encoded.webm"])
def test_sound_keeps_its_offset_to_the_first_picture(tmp_path: Path, target: str) -> None:
    """A transport stream counts its time from elsewhere; ours starts at 0."""
    noise = with_sound(tmp_path / "source.ts", "aac")
    pictures_with_sound_from(tmp_path / "source.ts", tmp_path / target, 48)
    samples = sound_of(tmp_path / target)[0]
    assert abs(displacement(noise, samples)) <= 48


def test_a_silent_source_gives_a_silent_video(tmp_path: Path) -> None:
    write(tmp_path / "silent.mp4", clip(5))
    write(tmp_path / "result.mp4", clip(5), audio_from=tmp_path / "silent.mp4")
    assert not probe_video(tmp_path / "result.mp4").has_audio


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    with_sound(tmp_path / "source.mp4", "aac", seconds=1)
    target = tmp_path / "result.mp4"
    target.write_text("old")
    before = sorted(tmp_path.iterdir())

    def fail_half_way() -> None:
        with VideoWriter(target, frame_rate=24, height=32, width=32, audio_from=tmp_path / "source.mp4") as writer:
            writer.write(clip(9))
            raise error

    with pytest.raises(error):
        fail_half_way()
    assert target.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == before


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    x_CTHW = clip(2)
    (tmp_path / "text.mp4").write_text("hello")
    before = sorted(tmp_path.iterdir())
    for name, options, reason in [
        ("a.avi", {}, "choose one of these suffixes"),
        ("no/a.mp4", {}, "does not exist; create it first"),
        ("", {}, "choose one"),
        ("a.mp4", {"frame_rate": 0}, "all are positive"),
        ("a.mp4", {"audio_from": tmp_path / "missing.mp4"}, "No such file"),
        ("a.mp4", {"audio_from": tmp_path / "text.mp4"}, "cannot be read"),
    ]:
        with pytest.raises(MediaError, match=reason):
            write(tmp_path / name, x_CTHW, **options)
    with pytest.raises(MediaError, match="not finite"):
        write(tmp_path / "a.mp4", x_CTHW / 0)
    with pytest.raises(MediaError, match="no frames"):
        write(tmp_path / "a.mp4", x_CTHW[:, :0])
    for wrong in (x_CTHW[None], x_CTHW[:2], x_CTHW[:, :, 1:]):
        with (
            pytest.raises(ShapeError, match=r"\(3, T, 32, 32\)"),
            VideoWriter(tmp_path / "a.mp4", frame_rate=25, height=32, width=32) as writer,
        ):
            writer.write(wrong)
    assert sorted(tmp_path.iterdir()) == before


def test_the_path_is_checked_before_the_long_work(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="does not exist"):
        VideoWriter(tmp_path / "no" / "a.mp4", frame_rate=25, height=8, width=8).__enter__()


def test_what_is_no_video_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "empty.mp4").touch()
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48_000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 48_000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    for name, reason in {
        "text.mp4": "Invalid data",
        "empty.mp4": "is empty",
        "missing.mp4": "No such file",
        "sound.mp4": "has no pictures",
        "": "is a folder",
    }.items():
        with pytest.raises(MediaError, match=reason) as caught:
            probe_video(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_truncated_files_are_refused_or_reported(tmp_path: Path) -> None:
    noise = torch.rand(3, 30, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for suffix in (".mp4", ".mkv"):
        write(tmp_path / f"whole{suffix}", noise)
        data = (tmp_path / f"whole{suffix}").read_bytes()
        (tmp_path / f"cut{suffix}").write_bytes(data[: len(data) // 2])
    with pytest.raises(MediaError, match="truncated"):
        read(tmp_path / "cut.mp4")
    # Between two frames, where the sound is, nothing is broken; there is only less of it.
    with_sound(tmp_path / "sound.mp4", "aac")
    pictures_with_sound_from(tmp_path / "sound.mp4", tmp_path / "both.mp4", 40)
    data = (tmp_path / "both.mp4").read_bytes()
    outcomes = []
    for length in range(len(data) // 4, len(data), len(data) // 20):
        (tmp_path / "cut.mp4").write_bytes(data[:length])
        try:
            outcomes.append(str(read(tmp_path / "cut.mp4").shape[1]))
        except MediaError as error:
            outcomes.append(str(error).rpartition(":")[2])
    assert any("of 40 frames are there" in outcome for outcome in outcomes), outcomes
    assert {outcome for outcome in outcomes if outcome.isdigit()} <= {"40"}, outcomes
    with pytest.warns(UserWarning, match=r"ends after 0\.\d+ of 1\.20 seconds"):
        assert 5 < read(tmp_path / "cut.mkv").shape[1] < 25
