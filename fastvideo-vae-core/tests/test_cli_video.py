"""The command line on video: what goes in comes out, whatever the length, the rate, the colours and the sound."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastvideo_vae_core import registry
from fastvideo_vae_core.cli import clips
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.distribution import DiagonalGaussianDistribution
from fastvideo_vae_core.errors import MediaError
from fastvideo_vae_core.family import Component, Evidence, Family, Inferred, Layout
from fastvideo_vae_core.latents import LatentFile, read_latents, write_latents
from fastvideo_vae_core.media import ColorTags, VideoReader, VideoWriter, probe_video, read_image
from fastvideo_vae_core.metrics import psnr, ssim
from fastvideo_vae_core.plan import Direction
from fastvideo_vae_core.testing import toys
from fastvideo_vae_core.testing.command import Command
from fastvideo_vae_core.testing.plugins import installed
from fastvideo_vae_core.tiling import Axis, Step
from fastvideo_vae_core.vae import ParallelTiledVAE

MODULE = "toy_folding"
NTSC_FILM = Fraction(24_000, 1001)
FRAMES, HEIGHT, WIDTH = 12, 34, 50


class Folding(ParallelTiledVAE[DiagonalGaussianDistribution]):
    """(B, 3, 2t - 1, 2h, 2w) <-> (B, 24, t, h, w), without loss: pixels become channels.

    The first frame comes twice.
    """

    family = "folding"
    sample_layout = "(B, C, T, H, W)"

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        if config.load_encoder:
            self.encoder = nn.PReLU(1, 1.0)
        if config.load_decoder:
            self.decoder = nn.PReLU(1, 1.0)

    @property
    def sample_axes(self) -> tuple[Axis, ...]:
        return Axis(up=2, lead=1), Axis(up=2), Axis(up=2)

    @property
    def channels(self) -> tuple[int, int]:
        return 3, 24

    def _encode(self, x: Tensor) -> Tensor:
        return self._fold(torch.cat([x[:, :, :1], x], 2))

    def _decode(self, z: Tensor) -> Tensor:
        return self._unfold(z)[:, :, 1:]

    def _fold(self, x: Tensor) -> Tensor:
        folded = x.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        mean = folded.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
        return self.encoder(torch.cat([mean, torch.full_like(mean, -30)], 1))

    def _unfold(self, z: Tensor) -> Tensor:
        x = self.decoder(z).unflatten(1, (3, 2, 2, 2)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _stream(self, direction: Direction, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        pieces = toys._regroup(chunks, 1, 2 if direction == "encode" else 1)
        for index, piece in enumerate(pieces):
            if direction == "encode":
                yield self._fold(piece) if index else self._encode(piece)
            else:
                yield self._unfold(piece) if index else self._decode(piece)

    def posterior(self, parameters: Tensor) -> DiagonalGaussianDistribution:
        return DiagonalGaussianDistribution(parameters)

    def normalize_latents(self, z: Tensor) -> Tensor:
        return z / 2

    def denormalize_latents(self, z: Tensor) -> Tensor:
        return z * 2

    def encode_steps(self) -> Sequence[Step]:
        return []

    def decode_steps(self) -> Sequence[Step]:
        return []


def infer(evidence: Evidence) -> Inferred:
    return Inferred(arch=toys.ToyArchConfig())


FAMILY = Family(
    name="folding",
    distribution="fastvideo-vae-core",
    title="video: folds pixels into channels",
    components=(
        Component(
            media="video",
            model=f"{MODULE}:Folding",
            arch="fastvideo_vae_core.testing.toys:ToyArchConfig",
            class_names=("Folding",),
            variants={},
            layouts=(Layout(name="diffusers", markers=(("encoder.weight", 1), ("decoder.weight", 1))),),
            infer=f"{MODULE}:infer",
        ),
    ),
    demo="model.safetensors",
    demo_media="clip.mp4",
)
POINT = EntryPoint(name="folding", group=registry.GROUP, value=f"{MODULE}:FAMILY")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in with a clip that has sound, and the family whose demonstration it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, MODULE, sys.modules[__name__])
    save_file({"encoder.weight": torch.ones(1), "decoder.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    write_clip(tmp_path / "clip.mp4", moving(FRAMES), NTSC_FILM, sound=True)
    monkeypatch.setattr(Family, "resource", lambda self, name: tmp_path / name)
    with installed(POINT):
        yield tmp_path


def moving(frames: int, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """A clip (3, T, H, W) in which every frame differs from every other, smooth enough for a lossy codec."""
    t = torch.arange(frames).view(1, -1, 1, 1) * 0.4
    phase = torch.tensor([0.0, 2.0, 4.0]).view(3, 1, 1, 1)
    x, y = torch.arange(width) / width * 6, torch.arange(height).view(-1, 1) / height * 6
    return torch.sin(x + t + phase) * torch.cos(y - t) * 0.9


def write_clip(path: Path, x_CTHW: Tensor, rate: Fraction | int, *, sound: bool = False, **settings: Any) -> None:
    """A clip as another program writes it; its sound is as long as its pictures."""
    source = None
    if sound:
        source = path.with_name("sound-only.mp4")
        length = round(x_CTHW.shape[1] / rate * 48_000)
        noise = np.random.default_rng(0).uniform(-0.5, 0.5, (2, length)).astype(np.float32)
        with av.open(str(source), "w") as container:
            stream = container.add_stream("aac", rate=48_000, layout="stereo")
            frame = av.AudioFrame.from_ndarray(noise, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = 48_000, 0
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    height, width = x_CTHW.shape[2:]
    with VideoWriter(path, frame_rate=rate, height=height, width=width, audio_from=source, **settings) as writer:
        writer.write(x_CTHW)
    if source is not None:
        source.unlink()


def read(path: str | Path) -> Tensor:
    with VideoReader(path) as reader:
        return torch.cat(list(reader), 1)


def packets(path: str | Path) -> list[bytes]:
    """The sound of a file, as it is stored."""
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]


# -------------------------------------------------------------------- what goes in comes out


@pytest.mark.parametrize("frames", [1, 2, 5, 8])
def test_a_clip_of_any_length_comes_back(run: Command, desk: Path, frames: int) -> None:
    write_clip(desk / "in.mkv", moving(frames), NTSC_FILM, crf=0)
    encoded = run("encode", "in.mkv", "-o", "in.safetensors")
    assert encoded.code == 0, encoded.err
    assert ("is padded to" in encoded.err) == (frames % 2 == 0)
    file = read_latents("in.safetensors")
    assert file.latents.shape == (1, 24, frames // 2 + 1, HEIGHT // 2, WIDTH // 2)
    assert (file.sample_shape, file.frame_rate) == ((1, 3, frames, HEIGHT, WIDTH), "24000/1001")

    assert run("decode", "in.safetensors", "-o", "out.mkv", "--crf", "0").code == 0
    assert probe_video("out.mkv").frame_rate == NTSC_FILM
    # RGB becomes YUV and RGB again: two roundings of at most one level each, and chroma at half the resolution.
    assert psnr(read("in.mkv")[None], read("out.mkv")[None]).item() > 45


def test_sizes_off_the_grid_are_padded_and_come_back(run: Command, desk: Path) -> None:
    x = moving(4, 33, 49)
    write_clip(desk / "odd.mp4", x, 25, crf=0)
    encoded = run("encode", "odd.mp4", "-o", "odd.safetensors")
    assert "4 x 33 x 49 is padded to 5 x 34 x 50" in encoded.err
    # The last frame, row and column again.
    z = read_latents("odd.safetensors").latents
    unfolded = Folding(VAEConfig(arch_config=toys.ToyArchConfig()))._decode(z)
    assert torch.equal(unfolded[:, :, 4], unfolded[:, :, 3])
    assert torch.equal(unfolded[..., 33, :], unfolded[..., 32, :])
    assert torch.equal(unfolded[..., 49], unfolded[..., 48])
    assert run("decode", "odd.safetensors", "-o", "back.mp4", "--crf", "0").code == 0
    assert read("back.mp4").shape == x.shape
    assert psnr(read("odd.mp4")[None], read("back.mp4")[None]).item() > 45


def test_without_padding_the_way_out_is_named(run: Command, desk: Path) -> None:
    arguments = ("encode", "clip.mp4", "-o", "x.safetensors", "-q", "--no-pad")
    run(*arguments).assert_fails("12 x 34 x 50; pass 11 x 34 x 50 or 13 x 34 x 50", "leave out --no-pad")
    assert not (desk / "x.safetensors").exists()


@pytest.mark.parametrize("matrix", ["bt709", "smpte170m"])
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
def test_colours_and_their_tags_are_kept(run: Command, desk: Path, matrix: str, full: bool) -> None:
    color = ColorTags(matrix=matrix, range="pc" if full else "tv", primaries=matrix, transfer=matrix)
    write_clip(desk / "in.mp4", moving(5), 25, color=color, crf=0)
    assert run("roundtrip", "in.mp4", "-o", "direct.mp4", "--crf", "0").code == 0
    assert run("encode", "in.mp4", "-o", "in.safetensors").code == 0
    assert run("decode", "in.safetensors", "-o", "by-way-of-latents.mp4", "--crf", "0").code == 0
    for name in ("direct.mp4", "by-way-of-latents.mp4"):
        assert probe_video(name).color == color
        # See test_a_clip_of_any_length_comes_back. The other matrix or range would give less than 30 dB.
        assert psnr(read("in.mp4")[None], read(name)[None]).item() > 45


def test_pixels_of_a_lossless_clip_in_bt709_are_right(run: Command, desk: Path) -> None:
    """Written by FFmpeg alone: limited range, luma 126 is middle grey, 16 is black, 235 is white."""
    with av.open("grey.mkv", "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = 1, 1
        for luma in (16, 126, 235):
            frame = av.VideoFrame(32, 16, "yuv420p")
            for plane, value in zip(frame.planes, (luma, 128, 128), strict=True):
                plane.update(bytes([value]) * plane.buffer_size)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert run("roundtrip", "grey.mkv", "-o", "back.mkv", "--crf", "0").code == 0
    assert run("encode", "grey.mkv", "-o", "grey.safetensors").code == 0
    z = read_latents("grey.safetensors").latents
    levels = [(z[0, :, t, 0, 0].mean().item() + 1) * 127.5 for t in (0, 1)]
    assert levels == pytest.approx([0, (128 + 255) / 2], abs=0.6)
    assert (read("back.mkv") - read("grey.mkv")).abs().max() <= 1 / 127.5 + 1e-6


def test_rate_aspect_and_sound_pass_through_a_round_trip(run: Command, desk: Path) -> None:
    write_clip(desk / "in.mp4", moving(24), NTSC_FILM, sound=True, pixel_aspect=Fraction(16, 15))
    ran = run("roundtrip", "in.mp4", "-o", "out.mp4")
    assert ran.code == 0, ran.err
    before, after = probe_video("in.mp4"), probe_video("out.mp4")
    assert (after.frame_rate, after.pixel_aspect, after.frames) == (NTSC_FILM, Fraction(16, 15), 24)
    assert before.has_audio
    assert packets("out.mp4") == packets("in.mp4")
    assert run("roundtrip", "in.mp4", "-o", "mute.mp4", "--no-sound").code == 0
    assert not probe_video("mute.mp4").has_audio


def test_latents_keep_the_aspect_and_take_sound_and_rate_from_options(run: Command, desk: Path) -> None:
    write_clip(desk / "in.mp4", moving(24), NTSC_FILM, sound=True, pixel_aspect=Fraction(16, 15))
    run("encode", "in.mp4", "-o", "in.safetensors")
    assert run("decode", "in.safetensors", "-o", "out.mp4", "--sound", "in.mp4").code == 0
    assert probe_video("out.mp4").pixel_aspect == Fraction(16, 15)
    assert packets("out.mp4") == packets("in.mp4")
    assert run("decode", "in.safetensors", "-o", "slow.mp4", "--frame-rate", "12.5").code == 0
    assert probe_video("slow.mp4").frame_rate == Fraction(25, 2)


def test_latents_without_a_rate_ask_for_one(run: Command, desk: Path) -> None:
    run("encode", "clip.mp4", "-o", "clip.safetensors")
    made = read_latents("clip.safetensors")
    bare = LatentFile(latents=made.latents, provenance=made.provenance, space="raw", sample_shape=made.sample_shape)
    write_latents("bare.safetensors", bare)
    run("decode", "bare.safetensors", "-o", "out.mp4", "-q").assert_fails("pass --frame-rate")
    assert run("decode", "bare.safetensors", "-o", "out.mp4", "-q", "--frame-rate", "24").code == 0


def test_normalized_latents_are_normalized(run: Command, desk: Path) -> None:
    run("encode", "clip.mp4", "-o", "raw.safetensors")
    run("encode", "clip.mp4", "-o", "normalized.safetensors", "--normalized")
    raw, normalized = read_latents("raw.safetensors"), read_latents("normalized.safetensors")
    assert torch.equal(normalized.latents, raw.latents / 2)
    for name in ("raw", "normalized"):
        # Without loss, because x264 does not always make the same of the same frames.
        assert run("decode", f"{name}.safetensors", "-o", f"{name}.mp4", "--crf", "0").code == 0
    assert torch.equal(read("raw.mp4"), read("normalized.mp4"))


def test_uneven_frame_times_are_said(run: Command, desk: Path) -> None:
    with av.open("uneven.mkv", "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for time in (0, 40, 80, 280, 320):
            frame = av.VideoFrame(32, 16, "yuv420p")
            for plane in frame.planes:
                plane.update(bytes([100]) * plane.buffer_size)
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    ran = run("roundtrip", "uneven.mkv", "-o", "out.mp4")
    assert ran.code == 0, ran.err
    assert "frames come at uneven times" in ran.out


# -------------------------------------------------------------------- numbers and pictures


def test_metrics_are_those_of_the_whole_clip(run: Command, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge sees pieces; the metrics know none."""
    damage = torch.linspace(0.5, 1.2, 15).view(1, 1, -1, 1, 1)
    seen: list[Tensor] = []
    update = clips.ClipJudge.update

    def worse(self: clips.ClipJudge, x: Tensor, y: Tensor) -> None:
        seen.append(x)
        start = sum(each.shape[2] for each in seen[:-1])
        update(self, x, y * damage[:, :, start : start + x.shape[2]])

    monkeypatch.setattr(clips.ClipJudge, "update", worse)
    document = run("roundtrip", "clip.mp4", "-o", "out.mp4", "--json").json
    x = torch.cat(seen, 2)
    y = x * damage[:, :, :FRAMES]
    assert document["metrics"]["psnr"] == pytest.approx(psnr(x, y).item(), abs=1e-6)
    frames = torch.cat([ssim(a, b) for a, b in zip(x.unbind(2), y.unbind(2), strict=True)])
    assert document["metrics"]["ssim"] == pytest.approx(frames.mean().item(), abs=1e-9)


def test_a_round_trip_without_loss_says_so(run: Command, desk: Path) -> None:
    ran = run("roundtrip", "clip.mp4", "-o", "out.mp4")
    assert "PSNR     inf dB" in ran.out
    assert "SSIM     1.0000" in ran.out
    assert "3 x 12 x 34 x 50 (0.50 s at 23.976 frames a second)" in ran.out
    document = run("roundtrip", "clip.mp4", "-o", "out.mp4", "--json").json
    assert document["metrics"] == {"psnr": None, "ssim": pytest.approx(1)}
    assert (document["frame_rate"], document["sample_shape"]) == ("24000/1001", [1, 3, 12, 34, 50])
    assert document["padded_shape"] == [1, 3, 13, 34, 50]
    assert set(document["seconds"]) == {"encode", "decode"}


@pytest.mark.parametrize("frames", [1, 3, 40])
def test_the_comparison_shows_frames_from_all_over_the_clip(run: Command, desk: Path, frames: int) -> None:
    judge = clips._judge(clips.Facts(frame_rate=Fraction(20)))
    x = moving(frames)[None]
    for piece in x.split(7, 2):
        judge.update(piece, piece)
    assert isinstance(judge, clips.ClipJudge)
    kept = [frame for frame, _, _ in judge._kept]
    assert len(kept) <= 8
    assert kept[0] == 0
    assert max(b - a for a, b in zip([*kept, frames], [*kept[1:], frames], strict=False)) <= max(frames // 4, 1)
    assert all(torch.equal(shown, x[0, :, frame]) for frame, shown, _ in judge._kept)
    judge.compare(desk / "picture.png", "a title", {"PSNR": "inf dB"})
    picture = read_image(desk / "picture.png")
    assert picture.shape[1] > picture.shape[2] / 6 * min(frames, 4)


def test_the_demo_is_a_clip(run: Command, desk: Path) -> None:
    ran = run("demo")
    assert (ran.code, ran.err) == (0, "")
    assert "A real clip went through" in ran.out
    names = ["comparison.png", "original.mp4", "reconstruction.mp4"]
    assert sorted(path.name for path in (desk / "demo-output").iterdir()) == names
    assert (desk / "demo-output" / "original.mp4").read_bytes() == (desk / "clip.mp4").read_bytes()
    assert packets("demo-output/reconstruction.mp4") == packets("clip.mp4")


def test_a_sample_does_not_depend_on_the_cuts(run: Command, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = ("encode", "clip.mp4", "--sample", "-q", "-o")
    run(*sample, "streamed.safetensors")
    monkeypatch.setattr(Folding, "_stream", ParallelTiledVAE._stream)
    run(*sample, "whole.safetensors")
    run("encode", "clip.mp4", "-o", "mode.safetensors", "-q")
    streamed, whole, mode = (read_latents(f"{name}.safetensors").latents for name in ("streamed", "whole", "mode"))
    assert torch.equal(streamed, whole)
    # The deviation is exp(-15).
    assert 0 < (streamed - mode).abs().max() < 1e-5


def test_the_bar_counts_frames(run: Command, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for arguments in (
        ("encode", "clip.mp4", "-o", "clip.safetensors"),
        ("decode", "clip.safetensors", "-o", "out.mp4"),
        ("roundtrip", "clip.mp4", "-o", "out.mp4"),
    ):
        assert "12/12" in run(*arguments).err
        assert " frames" in run(*arguments).err
        assert "12/12" not in run(*arguments, "-q").err


# -------------------------------------------------------------------- memory


_PEAK = """
import importlib.util, re, sys
spec = importlib.util.spec_from_file_location("toy_folding", sys.argv[1])
toy = importlib.util.module_from_spec(spec)
sys.modules["toy_folding"] = toy
spec.loader.exec_module(toy)
from fastvideo_vae_core.cli.__main__ import main
name, model = sys.argv[2], ["--model", "model.safetensors"]
with toy.installed(toy.POINT):
    assert main(["encode", name, "-o", "z.safetensors", *model]) == 0
    assert main(["decode", "z.safetensors", "-o", "z.mp4", *model]) == 0
    assert main(["roundtrip", name, "-o", "back.mp4", *model]) == 0
print("peak", int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024)
"""


def test_ten_times_as_long_takes_no_more_memory(desk: Path) -> None:
    """Peak of the resident set, in MiB: what the longer clip has more would be 51 MiB, and its latents as much."""
    if not Path("/proc/self/status").exists():
        pytest.skip("this machine does not tell the peak of a process's memory")
    peaks = []
    for frames in (30, 300):
        write_clip(desk / f"{frames}.mkv", moving(frames, 128, 128), 25, crf=30, preset="ultrafast")
        script = [sys.executable, "-c", _PEAK, __file__, f"{frames}.mkv"]
        done = subprocess.run(script, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 30, peaks


# -------------------------------------------------------------------- bad input: one line, and nothing half-written


def test_what_is_no_video_is_refused(run: Command, desk: Path) -> None:
    (desk / "text.mp4").write_text("no video")
    (desk / "empty.mp4").touch()
    # Behind the sixth frame; x264 does not make the same bytes each time, and within a frame the error is another one.
    with av.open(str(desk / "clip.mp4")) as container:
        packets = [each for each in container.demux(video=0) if each.size]
    end = sorted(packet.pos + packet.size for packet in packets)[5]
    (desk / "cut.mp4").write_bytes((desk / "clip.mp4").read_bytes()[:end])
    encode = ("-o", "x.safetensors", "-q")
    run("encode", "text.mp4", *encode).assert_fails("text.mp4 cannot be read")
    run("encode", "empty.mp4", *encode).assert_fails("empty.mp4 is empty")
    run("encode", "gone.mp4", *encode).assert_fails("cannot read gone.mp4")
    run("encode", "cut.mp4", *encode).assert_fails("cut.mp4 is truncated: 6 of 12 frames are there")
    run("roundtrip", "text.mp4", "-o", "x.mp4", "-q").assert_fails("text.mp4 cannot be read")
    assert not [*desk.glob("x*")]


def test_a_clip_that_breaks_on_the_way_leaves_nothing(
    run: Command, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = VideoReader.read

    def breaks(self: VideoReader, frames: int) -> Tensor:
        if breaks.done:  # type: ignore[attr-defined]
            raise MediaError("clip.mp4 is truncated or broken in its pictures; copy the file again")
        breaks.done = True  # type: ignore[attr-defined]
        return read(self, min(frames, 3))

    for arguments in (("encode", "clip.mp4", "-o", "x.safetensors"), ("roundtrip", "clip.mp4", "-o", "x.mp4")):
        breaks.done = False  # type: ignore[attr-defined]
        monkeypatch.setattr(VideoReader, "read", breaks)
        run(*arguments, "-q").assert_fails("is truncated")
    assert not [*desk.glob("x*")]


def test_an_interrupt_leaves_what_was_there(run: Command, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (desk / "x.mp4").write_bytes(b"before")
    (desk / "x.safetensors").write_bytes(b"before")
    calls = 0

    def interrupt(self: Folding, z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise KeyboardInterrupt
        return fold(self, z)

    fold = Folding._fold
    monkeypatch.setattr(Folding, "_fold", interrupt)
    for arguments in (("encode", "clip.mp4", "-o", "x.safetensors"), ("roundtrip", "clip.mp4", "-o", "x.mp4")):
        calls = 0
        run(*arguments, "-q").assert_fails("interrupted", code=130)
    assert (desk / "x.mp4").read_bytes() == (desk / "x.safetensors").read_bytes() == b"before"


def test_outputs_that_cannot_be_written_are_refused_first(run: Command, desk: Path) -> None:
    run("roundtrip", "clip.mp4", "-o", "out.avi").assert_fails("must end in .mp4 or")
    run("roundtrip", "clip.mp4", "-o", "clip.mp4").assert_fails("is the input")
    run("encode", "clip.mp4", "-o", "clip.bin").assert_fails("must end in .safetensors")
    run("encode", "clip.mp4", "-o", "x.safetensors", "-q", "--downmix").assert_fails("--downmix is for audio")
    run("decode", "x.safetensors", "-o", "out.mp4", "--frame-rate", "0").assert_fails("--frame-rate")
    run("roundtrip", "clip.mp4", "-o", "out.mp4", "--crf", "52").assert_fails("--crf")


def test_without_the_libraries_the_extra_is_named(run: Command, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "av", None)
        run("encode", "clip.mp4", "-o", "x.safetensors", "-q").assert_fails('"fastvideo-vae-core[media]"')
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run("roundtrip", "clip.mp4", "-o", "x.mp4", "-q").assert_fails('"fastvideo-vae-core[report]"')
    assert not [*desk.glob("x*")]


def test_latents_that_say_nonsense_are_refused(run: Command, desk: Path) -> None:
    run("encode", "clip.mp4", "-o", "clip.safetensors")
    made = read_latents("clip.safetensors")
    for wrong in ({"frame_rate": "fast"}, {"frame_rate": "-24"}, {"color": {"hue": "red"}}, {"pixel_aspect": "0"}):
        facts = {"frame_rate": "24", **wrong}
        file = LatentFile(
            latents=made.latents, provenance=made.provenance, space="raw", sample_shape=made.sample_shape, **facts
        )
        write_latents("wrong.safetensors", file)
        run("decode", "wrong.safetensors", "-o", "x.mp4", "-q").assert_fails("nonsense")
