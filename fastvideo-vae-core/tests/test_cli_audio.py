"""The command line on sound: rates, channels, formats, and files of any length in flat memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastvideo_vae_core import registry
from fastvideo_vae_core.audio_metrics import si_sdr, stft_distance
from fastvideo_vae_core.cli import sounds, trips
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.distribution import DiagonalGaussianDistribution
from fastvideo_vae_core.family import Component, Evidence, Family, Inferred, Layout
from fastvideo_vae_core.latents import read_latents
from fastvideo_vae_core.media import VideoWriter, read_audio, read_image, resample, write_audio
from fastvideo_vae_core.plan import Direction
from fastvideo_vae_core.testing import toys
from fastvideo_vae_core.testing.command import Command
from fastvideo_vae_core.testing.plugins import installed
from fastvideo_vae_core.tiling import Axis, Step
from fastvideo_vae_core.vae import ParallelTiledVAE

MODULE = "toy_interleaving"
RATE, CHANNELS, UP = 16_000, 2, 4


class Interleaving(ParallelTiledVAE[DiagonalGaussianDistribution]):
    """(B, 2, 4s) <-> (B, 8, s), without loss: four samples become channels."""

    family = "interleaving"
    sample_layout = "(B, C, S)"
    padding_mode = "constant"
    sampling_rate = RATE

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        if config.load_encoder:
            self.encoder = nn.PReLU(1, 1.0)
        if config.load_decoder:
            self.decoder = nn.PReLU(1, 1.0)

    @property
    def sample_axes(self) -> tuple[Axis, ...]:
        return (Axis(up=UP),)

    @property
    def channels(self) -> tuple[int, int]:
        return CHANNELS, CHANNELS * UP

    def _encode(self, x: Tensor) -> Tensor:
        mean = x.unflatten(2, (-1, UP)).permute(0, 1, 3, 2).flatten(1, 2)
        return self.encoder(torch.cat([mean, torch.full_like(mean, -30)], 1))

    def _decode(self, z: Tensor) -> Tensor:
        return self.decoder(z).unflatten(1, (CHANNELS, UP)).permute(0, 1, 3, 2).flatten(2, 3)

    def _stream(self, direction: Direction, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Whole latents, late by one chunk, so that nothing may count on pieces that come as they went in."""
        held: Tensor | None = None
        for chunk in chunks:
            if held is not None:
                ready = held.shape[2] // UP * UP if direction == "encode" else held.shape[2]
                if ready:
                    yield self._run(direction, held[..., :ready], None)
                chunk = torch.cat([held[..., ready:], chunk], 2)
            held = chunk
        if held is not None:
            yield self._run(direction, held, None)

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
    name="interleaving",
    distribution="fastvideo-vae-core",
    title="audio: four samples become channels",
    components=(
        Component(
            media="audio",
            model=f"{MODULE}:Interleaving",
            arch="fastvideo_vae_core.testing.toys:ToyArchConfig",
            class_names=("Interleaving",),
            variants={},
            layouts=(Layout(name="diffusers", markers=(("encoder.weight", 1), ("decoder.weight", 1))),),
            infer=f"{MODULE}:infer",
        ),
    ),
    demo="model.safetensors",
    demo_media="song.flac",
)
POINT = EntryPoint(name="interleaving", group=registry.GROUP, value=f"{MODULE}:FAMILY")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in with a recording, and the family whose demonstration it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, MODULE, sys.modules[__name__])
    save_file({"encoder.weight": torch.ones(1), "decoder.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    write_audio(tmp_path / "song.flac", song(2 * RATE + 2), RATE)
    monkeypatch.setattr(Family, "resource", lambda self, name: tmp_path / name)
    with installed(POINT):
        yield tmp_path


def song(samples: int, rate: int = RATE, channels: int = CHANNELS) -> Tensor:
    """Tones of another pitch in every channel, below 4 kHz, and a little noise."""
    t = torch.arange(samples, dtype=torch.float64) / rate
    pitches = 220 * torch.arange(1, channels + 1, dtype=torch.float64).view(-1, 1)
    tones = 0.4 * torch.sin(2 * torch.pi * pitches * t) + 0.2 * torch.sin(2 * torch.pi * (pitches * 3 + 100 * t) * t)
    return tones.float() + 0.01 * torch.randn(channels, samples, generator=torch.Generator().manual_seed(0))


# -------------------------------------------------------------------- what goes in comes out


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".aiff"])
def test_sound_comes_back_by_way_of_latents(run: Command, desk: Path, suffix: str) -> None:
    encoded = run("encode", "song.flac", "-o", "song.safetensors")
    assert encoded.code == 0, encoded.err
    assert "32002 is padded to 32004" in encoded.err
    assert "2 x 32002 (2.00 s at 16000 Hz)" in encoded.out
    file = read_latents("song.safetensors")
    assert (file.sample_shape, file.sampling_rate) == ((1, 2, 32002), RATE)
    assert file.latents.shape == (1, 8, 8001)
    # The end is silence.
    assert file.latents[0, 2:4, -1].tolist() == [0, 0]
    assert run("decode", "song.safetensors", "-o", f"back{suffix}").code == 0
    back, rate = read_audio(f"back{suffix}")
    assert rate == RATE
    # 24 bits.
    torch.testing.assert_close(back, read_audio("song.flac")[0], rtol=0, atol=2**-23)


@pytest.mark.parametrize("suffix", [".ogg", ".mp3", ".m4a", ".opus"])
def test_lossy_formats_are_read_and_written(run: Command, desk: Path, suffix: str) -> None:
    rate = 48_000 if suffix == ".opus" else RATE
    write_audio(desk / f"in{suffix}", song(rate, rate), rate)
    ran = run("roundtrip", f"in{suffix}", "-o", "out.wav")
    assert ran.code == 0, ran.err
    before = resample(read_audio(f"in{suffix}")[0], rate, RATE)
    torch.testing.assert_close(read_audio("out.wav")[0], before.clamp(-1, 1), rtol=0, atol=1e-5)
    if suffix != ".opus":
        assert run("roundtrip", "song.flac", "-o", f"out{suffix}").code == 0
        assert read_audio(f"out{suffix}")[1] == RATE


def test_a_format_that_cannot_take_the_rate_names_another(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Interleaving, "sampling_rate", 44_100)
    run("roundtrip", "song.flac", "-o", "out.opus", "-q").assert_fails("does not take 44100 Hz")


@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_another_rate_is_resampled_and_said(run: Command, desk: Path, rate: int) -> None:
    x = song(3 * rate, rate)
    write_audio(desk / "in.wav", x, rate)
    encoded = run("encode", "in.wav", "-o", "in.safetensors")
    assert f"resampled from {rate} to {RATE} Hz" in encoded.out
    document = run("encode", "in.wav", "-o", "in.safetensors", "--json").json
    assert document["files"][0]["notes"] == [f"resampled from {rate} to {RATE} Hz"]
    assert document["files"][0]["sampling_rate"] == RATE
    assert run("decode", "in.safetensors", "-o", "out.wav").code == 0
    back, written = read_audio("out.wav")
    assert written == RATE
    expected = resample(read_audio("in.wav")[0], rate, RATE)
    torch.testing.assert_close(back, expected, rtol=0, atol=1e-5)


def test_mono_is_duplicated_and_said(run: Command, desk: Path) -> None:
    write_audio(desk / "mono.wav", song(RATE, channels=1), RATE)
    ran = run("roundtrip", "mono.wav", "-o", "out.wav")
    assert "mono is duplicated to 2 channels" in ran.out
    back, _ = read_audio("out.wav")
    torch.testing.assert_close(back, read_audio("mono.wav")[0].expand(2, -1), rtol=0, atol=2**-23)


def test_six_channels_offer_to_be_mixed_down(run: Command, desk: Path) -> None:
    """FFmpeg's mix: centre and surround at -3 dB, no low-frequency effects, and lower by the sum of the weights."""
    x = song(RATE, channels=6)
    soundfile.write("six.wav", x.T.numpy(), RATE, subtype="PCM_24")
    for arguments in (("encode", "six.wav", "-o", "x.safetensors"), ("roundtrip", "six.wav", "-o", "x.wav")):
        run(*arguments, "-q").assert_fails("six.wav has 6 channels, the model takes 2; --downmix mixes them")
    assert not [*desk.glob("x*")]
    ran = run("roundtrip", "six.wav", "-o", "x.wav", "--downmix")
    assert ran.code == 0, ran.err
    assert "6 channels are mixed down to 2" in ran.out
    left, right, centre, _, *surround = x
    sides = zip((left, right), surround, strict=True)
    expected = torch.stack([front + (centre + back) / 2**0.5 for front, back in sides]) / (1 + 2 * 0.5**0.5)
    torch.testing.assert_close(read_audio("x.wav")[0], expected, rtol=0, atol=1e-4)


def test_the_sound_of_a_video_goes_through_a_model_of_sound(run: Command, desk: Path) -> None:
    write_audio(desk / "sound.m4a", song(RATE), RATE)
    with VideoWriter("clip.mkv", frame_rate=10, height=16, width=16, audio_from="sound.m4a") as writer:
        writer.write(torch.zeros(3, 10, 16, 16))
    assert run("encode", "clip.mkv", "-o", "x.safetensors", "--family", "interleaving").code == 0
    # AAC ends with a whole packet.
    assert RATE <= read_latents("x.safetensors").sample_shape[2] <= RATE + 2048
    assert run("roundtrip", "clip.mkv", "-o", "x.wav").code == 0
    with VideoWriter("mute.mkv", frame_rate=10, height=16, width=16) as writer:
        writer.write(torch.zeros(3, 10, 16, 16))
    run("roundtrip", "mute.mkv", "-o", "y.wav", "-q").assert_fails("mute.mkv has 0 sound tracks")


# -------------------------------------------------------------------- numbers and pictures


def test_metrics_are_those_of_the_whole_recording(run: Command, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge sees pieces; the metrics know none."""
    pairs: list[tuple[Tensor, Tensor]] = []
    update = sounds.SoundJudge.update
    generator = torch.Generator().manual_seed(1)

    def worse(self: sounds.SoundJudge, x: Tensor, y: Tensor) -> None:
        pairs.append((x, y + 0.01 * torch.randn(y.shape, generator=generator)))
        update(self, *pairs[-1])

    monkeypatch.setattr(sounds.SoundJudge, "update", worse)
    document = run("roundtrip", "song.flac", "-o", "out.wav", "--json").json
    assert len(pairs) > 5
    x, y = (torch.cat(each, 2) for each in zip(*pairs, strict=True))
    assert x.shape[2] == 2 * RATE + 2
    assert document["metrics"]["si_sdr"] == pytest.approx(si_sdr(x, y).item(), abs=1e-6)
    assert document["metrics"]["stft_distance"] == pytest.approx(stft_distance(x, y).item(), abs=1e-6)
    assert 20 < document["metrics"]["si_sdr"] < 40


def test_a_round_trip_shows_both_spectrograms(run: Command, desk: Path) -> None:
    ran = run("roundtrip", "song.flac", "-o", "out.wav")
    assert (ran.code, "SI-SDR         inf dB" in ran.out, "STFT distance  0.0000" in ran.out) == (0, True, True)
    picture = read_image("out-comparison.png")
    assert picture.shape[2] > 1000
    assert picture.std() > 0.3
    document = run("roundtrip", "song.flac", "-o", "out.wav", "--json").json
    assert document["metrics"] == {"si_sdr": None, "stft_distance": 0}
    assert document["sampling_rate"] == RATE


def test_silence_and_a_moment_have_what_metrics_there_are(run: Command, desk: Path) -> None:
    write_audio(desk / "silence.wav", torch.zeros(2, RATE), RATE)
    ran = run("roundtrip", "silence.wav", "-o", "out.wav")
    assert (ran.code, "SI-SDR         none for silence" in ran.out) == (0, True)
    write_audio(desk / "moment.wav", song(100), RATE)
    assert set(run("roundtrip", "moment.wav", "-o", "out.wav", "--json").json["metrics"]) == {"si_sdr"}


def test_clipping_is_counted(run: Command, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Interleaving._decode
    monkeypatch.setattr(Interleaving, "_decode", lambda self, z: decode(self, z) * 4)
    x, _ = read_audio("song.flac")
    beyond = int((x.abs() * 4 > 1).sum())
    assert beyond > 100
    ran = run("roundtrip", "song.flac", "-o", "out.wav")
    assert f"{beyond} samples lay beyond full scale and were clipped" in ran.out


def test_the_demo_is_a_recording(run: Command, desk: Path) -> None:
    ran = run("demo", "--family", "interleaving")
    assert (ran.code, ran.err) == (0, "")
    assert "A real recording went through" in ran.out
    names = ["comparison.png", "original.flac", "reconstruction.wav"]
    assert sorted(path.name for path in (desk / "demo-output").iterdir()) == names


def test_the_bar_counts_seconds(run: Command, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert "2/2" in run("encode", "song.flac", "-o", "song.safetensors").err
    assert " seconds" in run("decode", "song.safetensors", "-o", "out.wav").err


# -------------------------------------------------------------------- sound beside pictures


@pytest.mark.parametrize("cuts", [[12], [1, 2, 9], [4, 8]])
def test_sound_is_moved_to_where_the_pictures_begin(cuts: list[int]) -> None:
    class Kept:
        def __init__(self) -> None:
            self.notes: list[str] = []
            self.pieces: list[Tensor] = []

        def write(self, y: Tensor) -> None:
            self.pieces.append(y)

    y = torch.arange(1.0, 25.0).view(1, 2, 12)
    for lead, expected in ((0, y), (3, torch.cat([torch.zeros(1, 2, 3), y], 2)), (-3, y[..., 3:])):
        kept = Kept()
        shifted = trips._Shifted(kept, lead)
        for piece in y.split(cuts, 2):
            shifted.write(piece)
        assert torch.equal(torch.cat(kept.pieces, 2), expected)


# -------------------------------------------------------------------- memory


_PEAK = """
import importlib.util, re, sys
spec = importlib.util.spec_from_file_location("toy_interleaving", sys.argv[1])
toy = importlib.util.module_from_spec(spec)
sys.modules["toy_interleaving"] = toy
spec.loader.exec_module(toy)
from fastvideo_vae_core.cli import codec, running
from fastvideo_vae_core.cli.__main__ import main
# The latents of the toy are short, and thousands of pieces are slow.
running._LATENTS = {1: 8192}
codec._PIECE = {"audio": 8192}
name, model = sys.argv[2], ["--model", "model.safetensors"]
with toy.installed(toy.POINT):
    assert main(["encode", name, "-o", "z.safetensors", *model]) == 0
    assert main(["decode", "z.safetensors", "-o", "z.wav", *model]) == 0
    if sys.argv[3:]:
        assert main(["roundtrip", name, "-o", "back.wav", *model]) == 0
print("peak", int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024)
"""


@pytest.mark.parametrize("more", [[], pytest.param(["roundtrip"], marks=pytest.mark.slow)], ids=["", "roundtrip"])
def test_ten_times_as_long_takes_no_more_memory(desk: Path, more: list[str]) -> None:
    """Peak of the resident set, in MiB: what the longer recording has more would be 66 MiB, and its latents as much."""
    if not Path("/proc/self/status").exists():
        pytest.skip("this machine does not tell the peak of a process's memory")
    peaks = []
    for seconds in (60, 600):
        noise = np.random.default_rng(0).standard_normal((seconds * RATE, 2), dtype=np.float32) / 10
        soundfile.write(f"{seconds}.wav", noise, RATE)
        script = [sys.executable, "-c", _PEAK, __file__, f"{seconds}.wav", *more]
        done = subprocess.run(script, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 30, peaks


# -------------------------------------------------------------------- bad input: one line, and nothing half-written


def _header_only(path: Path) -> None:
    soundfile.write(path, np.zeros((0, 2)), RATE)


def _half(path: Path) -> None:
    whole = path.with_name("song.flac").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("text.wav", lambda path: path.write_text("no sound"), "text.wav cannot be read as sound"),
        ("text.mp3", lambda path: path.write_text("no sound"), "text.mp3 cannot be read"),
        ("empty.wav", Path.touch, "empty.wav is empty"),
        ("gone.wav", lambda path: None, "cannot read gone.wav"),
        ("nothing.wav", _header_only, "nothing.wav holds no samples"),
        ("cut.flac", _half, "cut.flac is"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and " " not in value else "",
)
def test_what_is_no_sound_is_refused(
    run: Command, desk: Path, name: str, make: Callable[[Path], object], words: str
) -> None:
    make(desk / name)
    run("encode", name, "-o", "x.safetensors", "-q").assert_fails(words)
    run("roundtrip", name, "-o", "x.wav", "-q").assert_fails(words)
    assert not [*desk.glob("x*")]


def test_resampling_without_torchaudio_names_the_extra(
    run: Command, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_audio(desk / "in.wav", song(8_000, 8_000), 8_000)
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    monkeypatch.setitem(sys.modules, "torchaudio.functional", None)
    run("encode", "in.wav", "-o", "x.safetensors", "-q").assert_fails('"fastvideo-vae-core[audio]"')
    # Nothing needs it for sound that has the rate of the model.
    assert run("encode", "song.flac", "-o", "x.safetensors", "-q").code == 0


def test_options_of_other_media_are_refused(run: Command) -> None:
    arguments = ("encode", "song.flac", "-o", "x.safetensors", "-q")
    run(*arguments, "--tile", "64", "64").assert_fails("--tile is for image and video, this is audio")
    run(*arguments, "--tiling").assert_fails("--tiling is for image and video")
    run("roundtrip", "song.flac", "-o", "x.wav", "-q", "--crf", "0").assert_fails("--crf is for video")
    run(*arguments, "--no-pad").assert_fails("got 32002; pass 32000 or 32004", "leave out --no-pad")


def test_an_interrupt_leaves_what_was_there(run: Command, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    (desk / "x.wav").write_bytes(b"before")
    monkeypatch.setattr(Interleaving, "_decode", interrupt)
    run("roundtrip", "song.flac", "-o", "x.wav", "-q").assert_fails("interrupted", code=130)
    assert (desk / "x.wav").read_bytes() == b"before"


def test_a_file_of_a_video_container_is_told_by_its_tracks(run: Command, desk: Path) -> None:
    """mp3 and m4a of other programs have frames of their own lengths, and containers that do not say how long."""
    with av.open("raw.aac", "w", format="adts") as container:
        stream = container.add_stream("aac", rate=RATE, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(song(RATE).numpy()), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = RATE, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert run("encode", "raw.aac", "-o", "x.safetensors", "-q").code == 0
    assert read_latents("x.safetensors").sample_shape[2] >= RATE
